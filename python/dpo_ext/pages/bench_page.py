"""The result of `bench_data` as a table in the terminal and as a page without links."""

from __future__ import annotations

import html
from collections.abc import Sequence
from json import dumps
from typing import Any

import numpy as np

HEADER = ("stage", "ms", "fastest to slowest", "pairs/s", "tokens/s", "MB/s")


def _cells(stage: dict[str, Any]) -> list[str]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    spread = f"{stage['fastest'] * 1e3:,.1f} to {stage['slowest'] * 1e3:,.1f}"
    rates = [number(stage[key]) for key in ("pairs_per_s", "tokens_per_s", "mb_per_s")]
    return [stage["name"], f"{stage['seconds'] * 1e3:,.1f}", spread, *rates]


def summary(result: dict[str, Any]) -> str:
    """What the table is about, and what was verified, in words."""
    ids = {True: "ids equal to tokenizers", None: "tokenizers is not installed"}
    lines = [
        f"{result['pairs']:,} pairs, {result['tokens']:,} tokens, engine {result['engine']}, "
        f"{result['threads'] or 'all'} thread(s), median of {result['repeats']}, "
        f"{ids[result['ids_equal']]}",
        "fill: " + ", ".join(f"{name} {fill:.3f}" for name, fill in result["fill"].items()),
        f"tokenizer loaded in {result['load_seconds']:.2f} s, first pass "
        f"{result['cold_seconds']:.2f} s, peak memory {result['peak_mb']:,.0f} MB",
    ]
    trl = result["trl"]
    if trl is not None:
        lines.append(
            f"file to packed batches {trl['times']:,.0f}x, to padded batches "
            f"{trl['times_padded']:,.0f}x the pairs/s of TRL {trl['version']} end to end, on "
            f"{trl['pairs']:,} pairs; same ids in {trl['same']:,} of them"
        )
    return "\n".join(lines)


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="data path", caption=summary(result), caption_justify="left")
    for name in HEADER:
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    for stage in result["stages"]:
        table.add_row(*_cells(stage), style="dim" if stage["peer"] else None)
    console = Console()
    if not console.is_terminal:  # a log must not cut numbers to 80 columns
        console = Console(width=120)
    console.print(table)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>dpo_ext: data path</title><style>
body {{ font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }}
table {{ border-collapse: collapse; width: 100%; }}
td, th {{ padding: .3em .6em; text-align: right; border-bottom: 1px solid #ccc; }}
td:first-child, th:first-child {{ text-align: left; white-space: nowrap; }}
.bar {{ background: #3b6ea5; height: 1em; min-width: 1px; }}
.peer {{ background: #b3593b; }}
svg text {{ font: 12px sans-serif; }}
</style></head><body><h1>Data path</h1><p>{summary}</p>
<table><tr>{header}</tr>{rows}</table>
<h2>Pairs a second, on a logarithmic scale</h2><table>{rates}</table>
<h2>Fill: real tokens of all slots</h2><table>{fills}</table>
<h2>Pairs by length, in tokens of the longer side</h2>{lengths}
<h2>Rows</h2><pre>{report}</pre></body></html>
"""


def page(result: dict[str, Any]) -> str:
    """An HTML page that needs nothing from outside."""
    stages = result["stages"]
    top = max(np.log10(max(stage["pairs_per_s"], 10)) for stage in stages)
    rates = [
        _bar(
            stage["name"],
            f"{stage['pairs_per_s']:,.0f}",
            np.log10(max(stage["pairs_per_s"], 1)) / top,
            stage["peer"],
        )
        for stage in stages
    ]
    fills = [_bar(name, f"{fill:.3f}", fill) for name, fill in result["fill"].items()]
    counts = {key: result["report"][key] for key in ("read", "kept", "dropped", "warned")}
    return PAGE.format(
        summary=html.escape(summary(result)).replace("\n", "<br>"),
        header=_row(HEADER, "th"),
        rows="".join(f"<tr>{_row(_cells(stage))}</tr>" for stage in stages),
        rates="".join(rates),
        fills="".join(fills),
        lengths=_histogram(result["lengths"]),
        report=html.escape(dumps(counts, indent=2)),
    )


def _row(cells: Sequence[str], tag: str = "td") -> str:
    return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)


def _bar(name: str, value: str, share: float, peer: bool = False) -> str:
    kind = "bar peer" if peer else "bar"
    bar = f'<div class="{kind}" style="width:{100 * share:.1f}%"></div>'
    return f'<tr>{_row([name, value])}<td style="width:60%">{bar}</td></tr>'


def _histogram(lengths: dict[str, list[int]]) -> str:
    """Bars over the bins `edges`, with the count above each."""
    counts, edges = lengths["counts"], lengths["edges"]
    top, step, height = max(counts), 700 / len(counts), 160
    parts = []
    for i, count in enumerate(counts):
        tall = height * count / top
        x, y = i * step, 20 + height - tall
        title = f"<title>{edges[i]:,} to {edges[i + 1] - 1:,} tokens: {count:,} pairs</title>"
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{step - 2:.1f}" height="{tall:.1f}" '
            f'fill="#3b6ea5">{title}</rect>'
        )
        if i % 4 == 0:
            parts.append(f'<text x="{x:.1f}" y="{height + 36}">{edges[i]:,}</text>')
    return f'<svg viewBox="0 0 720 {height + 44}" width="100%">{"".join(parts)}</svg>'
