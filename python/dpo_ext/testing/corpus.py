"""Fixed cases at the ends of what a loss, a log-prob function and a collator meet.

They go before the drawn ones, in this order, and are the same everywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_ext.layout.table import ScoreTable
from dpo_ext.testing.strategies import GRID, PairLogps

CERTAIN = (0.0, -1e-6, -3.0)
GAPS = (1.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3)
LENGTHS = (0, 1, 10**5)


def _grid(generator: np.random.Generator, reach: float, *shape: int) -> np.ndarray:
    return -np.ceil(generator.uniform(0, reach * GRID, shape)) / GRID


def pair_cases(finite_up_to: float, *, lengths: bool) -> list[PairLogps]:
    """Pairs: N = 1 to 5 and 33, each column alone at its end, certain log-probs, ends of lengths.

    Args:
        finite_up_to: the largest gap.
        lengths: also lengths of 0, 1 and 10^5.
    """
    cases = []

    def add(rows: list[tuple[float, ...]]) -> None:
        numbers = torch.tensor(rows, dtype=torch.float64)
        columns = numbers[:, 0:2].clone(), numbers[:, 2:4].clone(), numbers[:, 4:6].long()
        cases.append(PairLogps(*columns))

    generator = np.random.default_rng(0)
    reach = min(30.0, finite_up_to)
    for N in (1, 2, 3, 4, 5, 33):
        values = _grid(generator, reach, N, 4)
        counts = generator.integers(1, 33, (N, 2))
        add([(*v, *n) for v, n in zip(values.tolist(), counts.tolist(), strict=True)])
    start = _grid(generator, reach, 3, 2).tolist()
    add([(c, r, c, r, 7, 3) for c, r in start])  # policy == reference
    gaps = sorted({g for g in GAPS if g < finite_up_to} | {finite_up_to})
    near = (-0.125, -0.25, -0.5, -0.375)
    for group in (gaps[:-1], gaps[-1:]):
        rows: list[tuple[float, ...]] = []
        for gap in group:
            # each column alone, then those that add up
            for columns in ((0,), (1,), (2,), (3,), (0, 3), (1, 2), (0, 1), (2, 3), (0, 1, 2, 3)):
                row = tuple(-gap if k in columns else near[k] for k in range(4))
                rows.append((*row, 5, 5))
        if rows:
            add(rows)
    for ref in ((-2.0, -1.0), (0.0, 0.0), (-1e-6, -3.0)):
        add([(c, r, *ref, 1, 2) for c in CERTAIN for r in CERTAIN])
    if lengths:
        rows = []
        total = {0: 0.0, 1: -2.0, 10**5: -min(2e3, finite_up_to / 2)}
        for nc in LENGTHS:
            for nr in LENGTHS:
                c, r = total[nc], total[nr] / 2
                rows.append((c, r, c * 1.5, r / 2, nc, nr))
        add([row for row in rows if 0 not in row[4:]])
        for row in rows:  # alone, because a loss may refuse an empty completion
            if 0 in row[4:]:
                add([row])
    return cases


class Scored(NamedTuple):
    """A case of `check_logps`: the numbers, and the lines that make them."""

    values: Tensor
    table: ScoreTable
    seed: int
    form: str = "contiguous"
    source: tuple[str, str] | None = None


FORMS = ("contiguous", "rows of a larger buffer", "every second column", "columns first", "offset")


def _scored(values: str, table: str, form: str = "contiguous", seed: int = 0) -> Scored:
    names = {"torch": torch, "ScoreTable": ScoreTable, "inf": float("inf"), "arange": torch.arange}
    made = [eval(text, dict(names)) for text in (values, table)]  # our own text, told in messages
    return Scored(made[0], made[1], seed, form, (values, table))


def _table(rows: str, targets: str, offsets: str, weights: str | None = None) -> str:
    parts = [
        f"logit_rows=torch.tensor({rows})",
        f"targets=torch.tensor({targets}, dtype=torch.int32)",
        f"seq_offsets=torch.tensor({offsets}, dtype=torch.int32)",
    ]
    if weights is not None:
        parts.append(f"weights=torch.tensor({weights})")
    return f"ScoreTable({', '.join(parts)})"


WEIGHTED = "[-1.0, 3.0, 1.0, 0.5, -1.0, 0.0, 3.0, 1.0]"
ROWS = "[0, 9, 2, 1, 5, 4, 7, 6]"  # out of order; two of the ten are not scored
OFFSETS = "[0, 1, 5, 5, 8]"  # one sequence is empty


def logit_cases(*, weighted: bool) -> list[Scored]:
    """Logits and tables: V of 1 to 4099, maxima that come late or early, strides, ends of tables.

    Args:
        weighted: also weights of -1, 0 and 3.
    """

    def random(rows: int, V: int, scale: int = 4) -> str:
        return f"torch.randn({rows}, {V}, generator=torch.Generator().manual_seed({V})) * {scale}"

    def eight(V: int, weights: str | None = None) -> str:
        last = V - 1
        ends = [0, last, V // 2, min(1024, last), last, 0, V // 3, min(1023, last)]
        return _table(ROWS, str(ends), OFFSETS, weights)

    cases = [_scored(random(10, V), eight(V)) for V in (1, 2, 33, 1024, 1025, 4099)]
    for V in (1025, 4099):
        rising = f"torch.linspace(-60, 60, {V}).repeat(10, 1)"
        front = f"torch.where(arange({V}) < 1024, -inf, arange({V}) % 7 + 3e4).repeat(10, 1)"
        last = _table(ROWS, str([V - 1] * 8), OFFSETS)
        cases.append(_scored(rising, eight(V)))
        cases.append(_scored(f"({rising}).flip(1)", eight(V)))
        cases.append(_scored(front, last))
    for V in (33, 1025):
        cases += [_scored(random(10, V), eight(V), form) for form in FORMS[1:]]
    if weighted:
        cases += [_scored(random(10, V), eight(V, WEIGHTED), seed=V) for V in (7, 1025)]
        cases += [_scored(random(10, 7), eight(7, f"[{w}] * 8")) for w in (-1.0, 3.0)]
    cases.append(_scored(f"{random(10, 9)} + (arange(10)[:, None] - 5) * 1e4", eight(9)))
    tables = [
        "ScoreTable(logit_rows=[], targets=[], seq_offsets=[0, 0, 0])",
        _table("[0, 1, 2]", "[-100, -100, -100]", "[0, 2, 3]"),
        _table("[0, 1, 2]", "[4, -100, 0]", "[0, 0, 3]"),
        _table("[2, 0, 1]", "[4, 1, 0]", "[0, 3, 3]"),
    ]
    cases += [_scored(random(3, 5), table) for table in tables]
    many = (
        "ScoreTable(logit_rows=arange(64).flip(0), targets=(arange(64) % 5).int(), "
        "seq_offsets=(arange(11) * 6.4).int())"
    )
    long = (
        "ScoreTable(logit_rows=arange(100001), targets=(arange(100001) % 3).int(), "
        "seq_offsets=torch.tensor([0, 1, 100001]).int())"
    )
    return [*cases, _scored(random(64, 5), many), _scored(random(100001, 3, 1), long)]


Row = dict[str, np.ndarray]


def row_cases(vocab_size: int, pad_id: int, longest: int) -> list[list[Row]]:
    """Batches of rows: 1 to 5 pairs, no or much padding, equal sides, pads as text, long ones.

    Batches with an empty prompt come last; each of them may be refused with a ValueError.
    """
    generator = np.random.default_rng(0)

    def ids(count: int) -> np.ndarray:
        return generator.integers(0, vocab_size, count).astype(np.int32)

    def row(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> Row:
        return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}

    def drawn(*sizes: int) -> Row:
        return row(*(ids(size) for size in sizes))

    pads, same, shared = np.full(4, pad_id, dtype=np.int32), ids(3), ids(2)
    empty = ids(0)
    return [
        [drawn(3, 2, 4)],
        [drawn(2, 5, 1), drawn(4, 1, 3)],
        [drawn(2, 3, 3), drawn(2, 3, 3), drawn(2, 3, 3)],  # nothing to pad
        [drawn(1, 1, 1), drawn(6, 7, 2), drawn(1, 2, 6), drawn(3, 1, 1)],
        [drawn(n, n + 1, 6 - n) for n in range(1, 6)],
        [row(ids(2), same, same.copy()), row(same, same, ids(1))],  # equal sides
        [row(ids(2), shared, np.concatenate((shared, ids(2)))), row(ids(2), shared, shared[:1])],
        [row(shared, ids(2), ids(3)), row(shared, ids(3), ids(1))],  # a prompt of two pairs
        [row(pads[:2], pads[:3], pads[:1]), row(ids(3), np.append(ids(2), pads[:2]), pads[:2])],
        [row(pads[:1], pads, pads), row(np.append(pads[:1], ids(2)), ids(1), ids(4))],
        [drawn(longest, longest, 1), drawn(1, 1, longest), drawn(1, 1, 1)],
        [row(empty, ids(3), ids(2))],
        [drawn(2, 3, 1), row(empty, ids(1), ids(4)), drawn(1, 2, 2)],
    ]
