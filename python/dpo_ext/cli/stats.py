"""`data_stats`: what a data set looks like to a model: lengths, waste by layout, boundaries, rows.

The command `dpo-ext stats`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from json import dumps
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from dpo_ext.data.dataset import PairDataset
from dpo_ext.data.options import Options, Paths, Progress
from dpo_ext.data.tokenizer import Tokenizer
from dpo_ext.layout.batch import LAYOUTS
from dpo_ext.report import Report

if TYPE_CHECKING:
    from numpy.typing import NDArray

QUANTILES = (0, 25, 50, 75, 90, 99, 100)
BATCHES = (4, 16, 64)
WINDOW = 16


@dataclass(frozen=True)
class Waste:
    """One way to lay the pairs out, in the order of seed 0.

    Attributes:
        layout: its name and what makes a batch.
        real_tokens: ids, each prompt counted as often as the layout holds it.
        slots: places, padding included.
        fill: ``real_tokens / slots``.
        relative: slots by those of ``padded`` with 64 pairs, or of all pairs if they are fewer.
    """

    layout: str
    real_tokens: int
    slots: int
    fill: float
    relative: float


def data_stats(
    files: Paths,
    tokenizer: Tokenizer,
    *,
    rows: int = 0,
    progress: Progress = False,
    json: str | PathLike[str] | None = None,
    show: bool = True,
    **options: Unpack[Options],
) -> dict[str, Any]:
    """Encodes files and says what is in them.

    Args:
        files, tokenizer, progress: as for :meth:`PairDataset.from_files`.
        rows: so many pairs, spread evenly over the data set, are spelt out token by token, not cut
            to ``max_length``.
        json: where to write the result as JSON.
        show: print it; needs rich.
        options: those of :meth:`PairDataset.from_files`, but that bad rows are skipped and counted
            by default.

    Returns:
        dict: ``pairs``, ``lengths`` (``prompt``, ``chosen``, ``rejected``, ``longer side``,
            ``both sides``: ``mean`` and the quantiles ``q0`` to ``q100``, in tokens), ``waste``
            (list of :class:`Waste` as dicts), ``histogram`` of the longer side (``counts``, and
            ``edges`` between them), ``merged`` (pairs with a token across the end of the
            prompt), ``report``, ``rows`` (list of dicts of token texts: ``prompt``, and for
            ``chosen`` and ``rejected`` ``merged``, the tokens that begin in the prompt's text, and
            ``rest``).

    Raises:
        ValueError: ``rows`` is negative.  Otherwise as :meth:`PairDataset.from_files`.
    """
    if rows < 0:
        raise ValueError(f"`rows` must be at least 0, found {rows}")
    options = {"on_bad": "skip", **options}
    pairs = PairDataset.from_files(files, tokenizer, progress=progress, **options)
    examples: list[dict[str, Any]] = []
    if rows and len(pairs):
        # Where a prompt was cut its own end is not known: the rows are shown in full.
        whole: Options = {**options, "max_length": None}
        cut = "truncated" in pairs.report.warned
        full = PairDataset.from_files(files, tokenizer, **whole) if cut else pairs
        separate: Options = {**whole, "boundary": "separate"}
        apart = PairDataset.from_files(files, tokenizer, **separate)
        examples = _examples(full, apart, tokenizer, rows)
    lengths = {
        "prompt": pairs.prompt_ids.lengths,
        "chosen": pairs.chosen_ids.lengths,
        "rejected": pairs.rejected_ids.lengths,
        "longer side": pairs.longest,
        "both sides": pairs.tokens,
    }
    result = {
        "pairs": len(pairs),
        "lengths": {name: _quantiles(values) for name, values in lengths.items()},
        "waste": [vars(row) for row in _waste(pairs)],
        "histogram": _histogram(pairs.longest),
        "merged": pairs.report.warned.get("boundary_merge", 0),
        "report": pairs.report.to_dict(),
        "rows": examples,
    }
    if show:
        show_stats(result)
    if json is not None:
        Path(json).write_text(dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _quantiles(values: NDArray[np.int64]) -> dict[str, float]:
    if len(values) == 0:
        return {"mean": 0.0, **{f"q{q}": 0.0 for q in QUANTILES}}
    found = np.percentile(values, QUANTILES)
    named = {f"q{q}": float(value) for q, value in zip(QUANTILES, found, strict=True)}
    return {"mean": float(values.mean()), **named}


def _waste(pairs: PairDataset) -> list[Waste]:
    """Padded batches of several sizes, then packed and shared bins that hold the longest pair."""
    if len(pairs) == 0:
        return []
    budget = max(8192, int(pairs.tokens.max()))
    plans = {
        f"padded, {size} pairs": pairs.plan(layout="padded", pairs_per_batch=size)
        for size in BATCHES
    }
    for layout in (name for name in LAYOUTS if name != "padded"):
        plans[f"{layout}, bins of {budget:,}"] = pairs.plan(layout=layout, tokens_per_batch=budget)
    stats = {name: plan.stats for name, plan in plans.items()}
    base = stats[f"padded, {BATCHES[-1]} pairs"].slots
    return [
        Waste(name, s.real_tokens, s.slots, s.fill, s.slots / base) for name, s in stats.items()
    ]


def _examples(
    pairs: PairDataset, apart: PairDataset, tokenizer: Tokenizer, count: int
) -> list[dict[str, Any]]:
    """Pairs as texts of tokens. ``apart`` knows the prompt's own text, where its ids end apart."""
    number = {int(row): i for i, row in enumerate(apart.rows)}
    chosen = np.unique(np.linspace(0, len(pairs) - 1, min(count, len(pairs))).astype(int))
    examples = []
    for i in chosen.tolist():
        pair = pairs[i]
        prompt = pair["prompt_ids"]
        alone = number.get(int(pairs.rows[i]))
        ends = None if alone is None else len(tokenizer.decode(apart.prompt_ids[alone]))
        seen = len(tokenizer.decode(prompt))
        example: dict[str, Any] = {
            "pair": i,
            "row": int(pairs.rows[i]) + 1,
            "prompt": _pieces(tokenizer, prompt, 0),
        }
        for side in ("chosen", "rejected"):
            ids = pair[f"{side}_ids"]
            pieces = _pieces(tokenizer, np.concatenate([prompt, ids]), len(prompt))
            merged = 0 if ends is None else _begin_before(pieces, seen, ends)
            example[side] = {"merged": pieces[:merged], "rest": pieces[merged:]}
        examples.append(example)
    return examples


def _pieces(tokenizer: Tokenizer, ids: NDArray[np.int32], start: int) -> list[str]:
    """The text that each token from ``start`` on adds; one inside a character adds none.

    Same as what ``decode(ids[:end])`` has beyond ``decode(ids[: end - 1])``, with a few tokens
    decoded for each: those since the last border between characters, and one stretch more before
    them, because decoders treat the beginning of a text in their own ways.
    """
    base = max(start - WINDOW, 0)
    read = start
    seen = tokenizer.decode(ids[base:start])
    pieces = []
    for end in range(start + 1, len(ids) + 1):
        text = tokenizer.decode(ids[base:end])
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}")
        if end - read >= WINDOW:
            # No character is that long: the text itself has these.
            whole = text
        pieces.append(whole[len(seen) :] if len(whole) > len(seen) else "")
        seen = max(seen, whole, key=len)
        if whole == text:
            base, read = read, end
            seen = tokenizer.decode(ids[base:read])
    return pieces


def _begin_before(pieces: list[str], seen: int, end: int) -> int:
    """How many tokens begin before character ``end``; ``seen`` characters stand before them."""
    for k, piece in enumerate(pieces):
        if seen >= end:
            return k
        seen += len(piece)
    return len(pieces)


def _histogram(longest: NDArray[np.int64]) -> dict[str, list[int]]:
    """Ten bins of the longer side."""
    edges = np.unique(np.linspace(0, int(longest.max(initial=0)) + 1, 11).astype(int))
    counts, _ = np.histogram(longest, edges)
    return {"counts": counts.tolist(), "edges": edges.tolist()}


def show_stats(result: dict[str, Any], said: Callable[[str], str] = str) -> None:
    """Prints what :func:`data_stats` gives; ``said`` changes the text of the report."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=120, highlight=False)
    console.print(said(str(Report.from_dict(result["report"]))), markup=False)
    if not result["pairs"]:
        return
    table = Table(title="tokens a pair", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("mean", "least", *(f"{q} %" for q in QUANTILES[1:-1]), "most"):
        table.add_column(name, justify="right")
    for name, values in result["lengths"].items():
        table.add_row(name, *(f"{value:,.0f}" for value in values.values()))
    console.print(table)
    _show_histogram(console, **result["histogram"])
    table = Table("layout", title="waste by layout, seed 0", title_justify="left")
    for name in ("real tokens", "slots", "fill", "slots to padded"):
        table.add_column(name, justify="right")
    for row in result["waste"]:
        numbers = (f"{row['real_tokens']:,}", f"{row['slots']:,}", f"{row['fill']:.3f}")
        table.add_row(row["layout"], *numbers, f"{row['relative']:.2f}x")
    console.print(table)
    console.print(
        f"{result['merged']:,} of {result['pairs']:,} pairs have a token across the end of the "
        "prompt; it belongs to the completion"
    )
    for example in result["rows"]:
        _show_example(console, example)


def _show_histogram(console: Any, counts: list[int], edges: list[int]) -> None:
    """A bar is the share of the fullest bin."""
    for (start, stop), count in zip(pairwise(edges), counts, strict=True):
        bar = "█" * round(40 * count / max(counts))
        console.print(f"{start:>7,} to {stop - 1:>7,}  {count:>10,}  [blue]{bar}[/]")


def _show_example(console: Any, example: dict[str, Any]) -> None:
    """Tokens in two shades by turns, so that their borders show; the labels also without colour."""
    from rich.text import Text

    def line(label: str, pieces: list[str], colour: str) -> None:
        text = Text(f"{label:>9}  ", style="bold")
        for i, piece in enumerate(pieces):
            shown = piece.replace("\n", "⏎")
            text.append(shown, style=colour if i % 2 else f"{colour} reverse")
        console.print(text)

    console.print(f"\npair {example['pair']}, row {example['row']}", style="bold")
    line("prompt", example["prompt"], "blue")
    for side, colour in (("chosen", "green"), ("rejected", "red")):
        if example[side]["merged"]:
            line("merged", example[side]["merged"], "yellow")
        line(side, example[side]["rest"], colour)
