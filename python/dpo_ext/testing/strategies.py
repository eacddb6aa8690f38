"""Hypothesis strategies for preference data: token ids, texts, logits, score tables, log-probs.

They shrink to small cases with few distinct numbers. All numbers lie on coarse binary grids, so
that sums and shifts of them are exact in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_ext.layout.table import ScoreTable
from dpo_ext.testing.search import hypothesis

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

GRID = 64  # log-probs are multiples of 1/64, exact in float32 up to 2^18


class PairLogps(NamedTuple):
    """Log-probs of N pairs: ``logps`` and ``ref_logps`` (N, 2) float64, ``lengths`` (N, 2)
    int64.
    """

    logps: Tensor
    ref_logps: Tensor
    lengths: Tensor


def _strategies() -> Any:
    hypothesis()
    import hypothesis.strategies as st

    return st


def pair_logps(
    *, min_pairs: int = 1, max_pairs: int = 4, max_log_ratio: float = 1e4
) -> SearchStrategy[PairLogps]:
    """Log-probs of pairs, each below 0: policy == reference, equal margins, usual and extreme ones.

    Args:
        min_pairs, max_pairs: number of pairs, N.
        max_log_ratio: largest |log-prob - reference log-prob|, and how far below 0 both may lie.
    """
    st = _strategies()
    far = int(max_log_ratio * GRID)
    near = min(100 * GRID, far)

    @st.composite
    def one(draw: Any) -> tuple[list[float], list[float], list[int]]:
        kind = draw(st.sampled_from(["near", "start", "same margin", "far"]))
        reach = far if kind == "far" else near
        ratios = [0, 0]
        if kind != "start":
            ratios = [draw(st.integers(-reach, reach)) for _ in range(2)]
        if kind == "same margin":
            ratios[1] = ratios[0]
        logps, ref = [], []
        for ratio in ratios:
            top = -draw(st.integers(1, far if kind == "far" else min(200 * GRID, far)))
            logps.append((top if ratio >= 0 else top + ratio) / GRID)
            ref.append((top - ratio if ratio >= 0 else top) / GRID)
        return logps, ref, [draw(st.integers(1, 32)) for _ in range(2)]

    def build(rows: list[tuple[list[float], list[float], list[int]]]) -> PairLogps:
        logps, ref, lengths = zip(*rows, strict=True)
        return PairLogps(
            torch.tensor(logps, dtype=torch.float64),
            torch.tensor(ref, dtype=torch.float64),
            torch.tensor(lengths),
        )

    return st.lists(one(), min_size=min_pairs, max_size=max_pairs).map(build)


def pairs(
    *,
    vocab_size: int = 97,
    min_prompt: int = 1,
    min_completion: int = 1,
    max_tokens: int = 12,
    pad_id: int | None = None,
) -> SearchStrategy[dict[str, np.ndarray]]:
    """Rows ``{"prompt_ids", "chosen_ids", "rejected_ids"}``, int32 arrays.

    Completions may be equal, start alike, repeat the prompt's last token, or hold ``pad_id`` as an
    ordinary token, which masks made by comparing with it get wrong.
    """
    st = _strategies()
    ids = st.integers(0, vocab_size - 1)
    if pad_id is not None:
        ids = st.one_of(ids, st.just(pad_id))

    @st.composite
    def row(draw: Any) -> dict[str, np.ndarray]:
        prompt = draw(st.lists(ids, min_size=min_prompt, max_size=max_tokens))
        start = draw(st.one_of(st.just([]), st.lists(ids, max_size=2), st.just(prompt[-1:])))
        sides = []
        for _ in range(2):
            rest = draw(st.lists(ids, max_size=max_tokens))
            missing = max(min_completion - len(start) - len(rest), 0)
            sides.append(start + rest + [draw(ids) for _ in range(missing)])
        arrays = [np.array(x, dtype=np.int32) for x in (prompt, *sides)]
        return dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), arrays, strict=True))

    return row()


def texts(*, max_size: int = 40) -> SearchStrategy[str]:
    """Texts that tokenizers and parsers trip over: several scripts, joiners, control characters,
    spellings of special tokens, surrogate-free but otherwise any code point."""
    st = _strategies()
    awkward = st.sampled_from(
        [
            " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u200b", "\u200d", "\ufeff", "\u2028", "\0",
            "e\u0301", "\u00e9", "\u1100\u1161", "\U0001f469\u200d\U0001f4bb", "\u0661\u0662",
            "'s", "'LL", "1234567", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "[INST]",
            "\n\nHuman: ", "\n\nAssistant: ", '"', "\\", "\\u0041", "{", "<|", "|>",
        ]
    )  # fmt: skip
    anything = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
    return st.lists(st.one_of(anything, awkward), max_size=max(max_size // 4, 1)).map(
        lambda parts: "".join(parts)[:max_size]
    )


def logits(
    *,
    min_rows: int = 1,
    max_rows: int = 6,
    vocab_sizes: tuple[int, ...] = (1, 2, 7, 31, 32, 33, 129),
) -> SearchStrategy[Tensor]:
    """(R, V) float32 on a grid of 1/64: flat, peaked, offset by up to 3e4, -inf columns, +-1e4.

    No row is all -inf. The entries come from a seeded generator, so a case is small to print.
    """
    st = _strategies()

    @st.composite
    def build(draw: Any) -> Tensor:
        rows, vocab = draw(st.integers(min_rows, max_rows)), draw(st.sampled_from(vocab_sizes))
        generator = np.random.default_rng(draw(st.integers(0, 2**16)))
        values = np.zeros((rows, vocab))
        for row in range(rows):
            kind = draw(st.sampled_from(["usual", "flat", "peaked", "offset", "extreme", "-inf"]))
            if kind != "flat":
                values[row] = np.round(generator.normal(size=vocab) * 4 * GRID) / GRID
            if kind == "peaked":
                values[row, generator.integers(vocab)] += 20
            if kind == "offset":
                values[row] += draw(st.sampled_from([-3e4, -1e3, 1e3, 3e4]))
            if kind == "extreme":
                values[row] = generator.choice([-1e4, 0, 1e4], size=vocab)
            if kind == "-inf" and vocab > 1:
                values[row, generator.integers(1, vocab)] = -np.inf
        return torch.tensor(values, dtype=torch.float32)

    return build()


def score_tables(
    rows: int, vocab_size: int, *, max_pairs: int = 3, ignored: bool = True, weighted: bool = True
) -> SearchStrategy[ScoreTable]:
    """Tables over (rows, vocab_size) logits: rows in any order, sequences of 0 or more tokens.

    Args:
        rows, vocab_size: shape of the logits.
        max_pairs: at most so many pairs.
        ignored: some targets are -100.
        weighted: some tables have weights, some of them 0.
    """
    st = _strategies()

    @st.composite
    def build(draw: Any) -> ScoreTable:
        sequences = 2 * draw(st.integers(1, max_pairs))
        order = draw(st.permutations(range(rows)))
        used = order[: draw(st.integers(0, rows))]
        cuts = sorted(
            draw(
                st.lists(st.integers(0, len(used)), min_size=sequences - 1, max_size=sequences - 1)
            )
        )
        target = st.integers(0, vocab_size - 1)
        if ignored:
            target = st.one_of(target, st.just(-100))
        targets = [draw(target) for _ in used]
        weights = None
        if weighted and draw(st.booleans()):
            choice = st.sampled_from([1.0, 0.5, 0.0, 2.0, -1.0, 3.0])
            weights = np.array([draw(choice) for _ in used], dtype=np.float32)
        return ScoreTable(
            logit_rows=np.array(used, dtype=np.int64),
            targets=np.array(targets, dtype=np.int32),
            seq_offsets=np.array([0, *cuts, len(used)], dtype=np.int32),
            weights=weights,
        )

    return build()
