"""The result of `bench_data` as a table in the terminal and as a page without links."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from dpo_ext.pages.axes import Axis
from dpo_ext.pages.charts import counted
from dpo_ext.pages.numbers import duration, rate
from dpo_ext.pages.page import facts, page, section, table, tile, tiles
from dpo_ext.pages.tracks import Row, bars, dots

HEADER = ("stage", "ms", "fastest to slowest", "pairs/s", "tokens/s", "MB/s")
FILES_SHOWN = 3
PEERS = (("dpo_ext", "policy"), ("peer, in the same process", "reference"))
IDS = {True: "ids equal to tokenizers", None: "tokenizers is not installed"}


def show(result: Mapping[str, Any]) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="data path", caption=summary(result), caption_justify="left")
    for name in HEADER:
        shown.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    for stage in result["stages"]:
        shown.add_row(*_cells(stage), style="dim" if stage["peer"] else None)
    console = Console()
    if not console.is_terminal:  # a log must not cut numbers to 80 columns
        console = Console(width=120)
    console.print(shown)


def summary(result: Mapping[str, Any]) -> str:
    """What came out, what the table is about, and what was verified, in words."""
    lines = [
        f"{result['pairs']:,} pairs, {result['tokens']:,} tokens, engine {result['engine']}, "
        f"{result['threads'] or 'all'} thread(s), median of {result['repeats']}, "
        f"{IDS[result['ids_equal']]}",
        "fill: " + ", ".join(f"{name} {fill:.3f}" for name, fill in result["fill"].items()),
        f"tokenizer loaded in {result['load_seconds']:.2f} s, first pass "
        f"{result['cold_seconds']:.2f} s, peak memory {result['peak_mb']:,.0f} MB",
    ]
    trl = result["trl"]
    if trl is not None:
        lines.insert(
            0,
            f"first pass: file to packed batches {trl['times']:,.0f}x, to padded batches "
            f"{trl['times_padded']:,.0f}x the pairs/s of TRL {trl['version']} end to end, on "
            f"{trl['pairs']:,} pairs; same ids in {trl['same']:,} of them",
        )
    return "\n".join(lines)


def _cells(stage: Mapping[str, Any]) -> list[str]:
    spread = f"{stage['fastest'] * 1e3:,.1f} to {stage['slowest'] * 1e3:,.1f}"
    rates = [rate(stage[key]) for key in ("pairs_per_s", "tokens_per_s", "mb_per_s")]
    return [stage["name"], f"{stage['seconds'] * 1e3:,.1f}", spread, *rates]


def render(result: Mapping[str, Any]) -> str:
    """The page; it names files and folders by their last part alone, so that it can be sent on."""
    sections = {
        "glance": ("At a glance", _glance(result)),
        "stages": ("Stage by stage", _stages(result)),
        "fill": ("Fill: how much of a batch is tokens", _fill(result)),
        "pairs": ("The pairs", _pairs(result)),
        "measured": ("What was measured, and on what", _measured(result)),
    }
    subtitle = (
        f"{_files(result)} · {result['pairs']:,} rows · {_threads(result)} of "
        f"{result['machine']['cpu']} · {result['date'][:10]}"
    )
    return page(
        kicker="dpo_ext bench",
        title="From a file of preferences to ready batches",
        subtitle=escape(subtitle),
        sections="".join(section(key, *each) for key, each in sections.items()),
    )


def _glance(result: Mapping[str, Any]) -> str:
    stages = {stage["name"]: stage for stage in result["stages"]}
    whole = stages["file to packed batches, first pass"]
    trl, fill = result["trl"], list(result["fill"].items())
    versions = result["machine"]["versions"]
    (padded, padded_fill), (packed, packed_fill) = fill[:2]
    shown = [
        tile(
            f"{whole['pairs_per_s']:,.0f} pairs/s",
            "from the file to packed batches, first pass",
            f"{duration(whole['seconds'])} for {result['pairs']:,} rows, {_threads(result)}",
        )
    ]
    if trl is not None:
        shown.insert(
            0,
            tile(
                f"{trl['times']:,.0f}×",
                f"the pairs a second of TRL {trl['version']}",
                f"first passes, file to packed batches; to padded {trl['times_padded']:,.0f}×",
            ),
        )
        shown.append(
            tile(
                f"{trl['same']:,} of {trl['pairs']:,}",
                "pairs have the ids that TRL gives them",
                "before anything was timed against it",
            )
        )
    if result["ids_equal"]:
        theirs, ours = stages["encode, peer: tokenizers"], stages[f"encode, {result['engine']}"]
        shown.append(
            tile(
                f"{ours['pairs_per_s'] / theirs['pairs_per_s']:,.0f}×",
                f"the rate of tokenizers {versions['tokenizers']}, encoding alone",
                "every id equal",
                True,
            )
        )
    shown.append(
        tile(
            f"{padded_fill:.0%} → {packed_fill:.0%}",
            "of the slots of a batch are tokens",
            f"{padded} → {packed}",
        )
    )
    return tiles(*shown) + _whole_way(result)


def _whole_way(result: Mapping[str, Any]) -> str:
    """From file to batches, ours and TRL's, as bars: here a length may say how much more it is."""
    names = {
        "file to packed batches, first pass": "dpo_ext, packed",
        "file to padded batches, first pass": "dpo_ext, padded",
        "rows to padded batches, first pass, peer: TRL": "TRL, padded",
    }
    rows = [
        Row(names[s["name"]], s["pairs_per_s"], rate(s["pairs_per_s"]), _colour(s))
        for s in result["stages"]
        if s["name"] in names
    ]
    axis = Axis.from_zero([row.value for row in rows], "{:,.0f}")
    return bars(
        rows, axis=axis, title="Pairs a second, from file to batches, first pass, on a linear scale"
    )


def _stages(result: Mapping[str, Any]) -> str:
    stages = result["stages"]
    rows = [Row(s["name"], s["pairs_per_s"], rate(s["pairs_per_s"]), _colour(s)) for s in stages]
    keys = PEERS if any(stage["peer"] for stage in stages) else PEERS[:1]
    places = dots(
        rows,
        axis=Axis.decades([row.value for row in rows]),
        title="Pairs a second, on a logarithmic scale: a line to the right is ten times as fast",
        keys=keys,
    )
    header = [HEADER[0], *(f"#{name}" for name in HEADER[1:])]
    cells = table(header, [_cells(s) for s in stages], dim=[s["peer"] for s in stages])
    return (
        f"{places}{cells}<p>Milliseconds are the median of {result['repeats']} runs for the whole "
        "input, of TRL one run; a first pass is by a tokenizer that has seen no text; MB are "
        "10<sup>6</sup> bytes of the files' text. Peers run in the same process on the same texts, "
        "after their ids have been compared with ours.</p>"
    )


def _fill(result: Mapping[str, Any]) -> str:
    rows = [Row(name, fill, f"{fill:.1%}") for name, fill in result["fill"].items()]
    return bars(
        rows,
        axis=Axis(0.0, 1.0, form="{:.0%}"),
        title="Real tokens of all slots; what is missing is padding, which costs as much",
    )


def _pairs(result: Mapping[str, Any]) -> str:
    lengths, report = result["lengths"], result["report"]
    chart = counted(
        lengths["counts"],
        lengths["edges"],
        x_label="tokens of the longer side, prompt included",
        title="Pairs by length",
    )
    counts = [("rows read", report["read"]), ("pairs kept", report["kept"])]
    for kind in ("dropped", "warned"):
        counts += [(f"{kind}: {name.replace('_', ' ')}", n) for name, n in report[kind].items()]
    rows = table(("", "#rows"), [(name, f"{n:,}") for name, n in counts])
    return f'<div class="charts">{chart}<div>{rows}</div></div>'


def _measured(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    options = ", ".join(f"{name} {value}" for name, value in result["options"].items())
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v is not None)
    absent = [name for name, v in machine["versions"].items() if v is None]
    known = {
        "data": f"{_files(result)}, {result['bytes'] / 1e6:,.1f} MB of text",
        "tokenizer": f"{Path(result['tokenizer']).name}, {result['vocab_size']:,} tokens, engine "
        f"{result['engine']}, loaded in {duration(result['load_seconds'])}",
        "options": options,
        "first pass": f"{duration(result['cold_seconds'])}, before anything was warm",
        "peak memory": f"{result['peak_mb']:,.0f} MB, before the peers",
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}",
        "instructions": ", ".join(machine["instructions"]) or "not known",
        "versions": versions + (f"; not installed: {', '.join(absent)}" if absent else ""),
        "date": result["date"],
    }
    return facts(known)


def _files(result: Mapping[str, Any]) -> str:
    names = [Path(path).name for path in result["files"]]
    more = len(names) - FILES_SHOWN
    return ", ".join(names[:FILES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def _threads(result: Mapping[str, Any]) -> str:
    threads = result["threads"]
    return "1 thread" if threads == 1 else f"{threads or 'all'} threads"


def _colour(stage: Mapping[str, Any]) -> str:
    return "reference" if stage["peer"] else "policy"
