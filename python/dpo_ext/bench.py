"""`bench_data`: how fast a file of preference pairs becomes batches, stage by stage, beside its
peer.

The ids are compared before anything is timed; the peer runs in the same process, on the same texts.
"""

from __future__ import annotations

import html
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from json import dumps
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from dpo_ext import _core
from dpo_ext.data import PairDataset, _files
from dpo_ext.errors import DpoExtError
from dpo_ext.options import Limits, Paths, Settings
from dpo_ext.tokenizer import Tokenizer, default_threads

PAIRS_PER_BATCH = 64


@dataclass(frozen=True)
class Stage:
    """One row of the table. Rates are of the median; times are seconds for the whole input.

    Attributes:
        name: what was timed.
        seconds: the median of the repeats.
        fastest, slowest: its spread.
        pairs_per_s, tokens_per_s, mb_per_s: of the pairs read, of the ids of both sides with their
            prompts, and of the text of the file (10^6 bytes); None where a stage has no such thing.
    """

    name: str
    seconds: float
    fastest: float
    slowest: float
    pairs_per_s: float
    tokens_per_s: float | None
    mb_per_s: float | None


def bench_data(
    files: Paths,
    tokenizer_dir: str | PathLike[str],
    *,
    threads: int | None = 1,
    repeats: int = 5,
    out: str | PathLike[str] | None = None,
    json: str | PathLike[str] | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Times the data path on a user's own file and tokenizer.

    Stages: reading and parsing alone; encoding alone, of prompt + chosen and prompt + rejected;
        rows to
    ids, the whole of :meth:`PairDataset.from_files`; padded batches of 64 pairs. Beside them, if
    the Python package ``tokenizers`` is installed, its ``encode_batch_fast`` on the same texts,
    with its own threads switched on if ``threads > 1``.

    Args:
        files: as for :meth:`PairDataset.from_files`; bad rows are skipped.
        tokenizer_dir: a model's folder.
        threads: of our stages; None for what :meth:`PairDataset.from_files` takes by itself.
        repeats: of each stage; the median counts.
        out: where to write a page with the table and bars, without any link to the outside.
        json: where to write the result as JSON.
        show: print the table; needs rich.

    Returns:
        dict: ``stages`` (list of :class:`Stage` as dicts), ``pairs``, ``tokens``, ``bytes``,
            ``fill``,
        ``ids_equal`` (None without the peer), ``report``, ``engine``, ``cold_seconds``,
        ``load_seconds``, and what it ran on.

    Raises:
        ValueError: a scalar out of range.  DpoExtError: our ids differ from the peer's.
    """
    if repeats < 1:
        raise ValueError(f"`repeats` must be at least 1, found {repeats}")
    default_threads(threads)
    paths = _files(files)
    load_seconds, tokenizer = _once(lambda: Tokenizer.from_pretrained(tokenizer_dir))

    def whole() -> PairDataset:
        return PairDataset.from_files(
            paths, tokenizer, on_bad="skip", threads=threads, max_length=None
        )

    cold_seconds, pairs = _once(whole)
    if len(pairs) == 0:
        raise ValueError(f"no row of {paths} gives a pair: {pairs.report}")
    tokens = int(pairs.tokens.sum())
    texts, peer = _texts(pairs, tokenizer), _peer(tokenizer, threads)
    ids_equal = None if peer is None else _verify(peer, tokenizer, texts)

    settings = Settings(limits=Limits(), threads=threads, on_bad="skip")
    plan = pairs.plan(layout="padded", pairs_per_batch=PAIRS_PER_BATCH)
    scanned, size = _core.scan(paths, tokenizer.vocab_size, settings)
    n, m = pairs.report.read, len(pairs)

    def stage(
        name: str, work: Callable[[], Any], count: int, ids: int | None, text: int | None
    ) -> Stage:
        times = [_once(work)[0] for _ in range(repeats)]
        middle = statistics.median(times)
        return Stage(
            name=name,
            seconds=middle,
            fastest=min(times),
            slowest=max(times),
            pairs_per_s=count / middle,
            tokens_per_s=None if ids is None else ids / middle,
            mb_per_s=None if text is None else text / middle / 1e6,
        )

    length = sum(len(text.encode()) for text in texts)
    encoded = len(tokenizer.encode_batch(texts, add_special_tokens=False).values)
    stages = [
        stage(
            "read and parse",
            lambda: _core.scan(paths, tokenizer.vocab_size, settings),
            scanned,
            None,
            size,
        ),
        stage(
            f"encode, {tokenizer.engine}",
            lambda: tokenizer.encode_batch(texts, add_special_tokens=False, threads=threads),
            m,
            encoded,
            length,
        ),
        stage(
            "file to ids",
            whole,
            n,
            tokens,
            size,
        ),
        stage("padded batches of 64", lambda: [None for _ in plan], m, tokens, None),
    ]
    if peer is not None:
        stages.append(stage("encode, peer: tokenizers", lambda: peer(texts), m, encoded, length))
    result = {
        "stages": [asdict(s) for s in stages],
        "pairs": n,
        "kept": m,
        "tokens": tokens,
        "bytes": size,
        "fill": plan.stats.fill,
        "ids_equal": ids_equal,
        "engine": tokenizer.engine,
        "threads": threads,
        "repeats": repeats,
        "load_seconds": load_seconds,
        "cold_seconds": cold_seconds,
        "report": pairs.report.to_dict(),
        "files": paths,
        "tokenizer": str(tokenizer_dir),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    if show:
        _show(result)
    if json is not None:
        Path(json).write_text(dumps(result, indent=2) + "\n", encoding="utf-8")
    if out is not None:
        Path(out).write_text(_page(result), encoding="utf-8")
    return result


def _once(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def _texts(pairs: PairDataset, tokenizer: Tokenizer) -> list[str]:
    """Prompt + completion of every side, spelt out from the ids."""
    prompts, sides = pairs.prompt_ids, (pairs.chosen_ids, pairs.rejected_ids)
    return [
        tokenizer.decode(np.concatenate([prompt, ids]))
        for side in sides
        for prompt, ids in zip(prompts, side, strict=True)
    ]


def _peer(tokenizer: Tokenizer, threads: int | None) -> Callable[[Sequence[str]], list[Any]] | None:
    """The Python package `tokenizers` on the same tokenizer.json, or None without it."""
    try:
        import tokenizers
    except ImportError:
        return None
    theirs = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    theirs.no_truncation()
    theirs.no_padding()
    if threads == 1:
        return lambda texts: [
            theirs.encode_batch_fast([t], add_special_tokens=False)[0] for t in texts
        ]
    return lambda texts: theirs.encode_batch_fast(list(texts), add_special_tokens=False)


def _verify(
    peer: Callable[[Sequence[str]], list[Any]], tokenizer: Tokenizer, texts: list[str]
) -> bool:
    """Same ids for every text, or an error that says for which."""
    ours = tokenizer.encode_batch(texts, add_special_tokens=False)
    for i, (mine, theirs) in enumerate(zip(ours, peer(texts), strict=True)):
        if mine.tolist() != theirs.ids:
            found = f"{len(mine)} ids, the peer {len(theirs.ids)} others"
            raise DpoExtError(f"text {i}: {found}")
    return True


def _cells(stage: dict[str, Any]) -> list[str]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    spread = f"{stage['fastest'] * 1e3:,.1f} to {stage['slowest'] * 1e3:,.1f}"
    rates = [number(stage[key]) for key in ("pairs_per_s", "tokens_per_s", "mb_per_s")]
    return [stage["name"], f"{stage['seconds'] * 1e3:,.1f}", spread, *rates]


HEADER = ("stage", "ms", "fastest to slowest", "pairs/s", "tokens/s", "MB/s")


def _summary(result: dict[str, Any]) -> str:
    ids = {True: "ids equal to tokenizers", None: "no peer installed"}[result["ids_equal"]]
    return (
        f"{result['pairs']:,} pairs, {result['tokens']:,} tokens, engine {result['engine']}, "
        f"{result['threads'] or 'all'} thread(s), median of {result['repeats']}, "
        f"fill {result['fill']:.2f}, {ids}; "
        f"tokenizer loaded in {result['load_seconds']:.2f} s, "
        f"first pass {result['cold_seconds']:.2f} s"
    )


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="data path", caption=_summary(result))
    for name in HEADER:
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    for stage in result["stages"]:
        table.add_row(*_cells(stage))
    console = Console()
    if not console.is_terminal:  # a log must not cut numbers to 80 columns
        console = Console(width=120)
    console.print(table)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>dpo_ext: data path</title><style>
body {{ font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }}
table {{ border-collapse: collapse; width: 100%; }}
td, th {{ padding: .3em .6em; text-align: right; border-bottom: 1px solid #ccc; }}
td:first-child, th:first-child {{ text-align: left; }}
.bar {{ background: #3b6ea5; height: 1em; min-width: 1px; }}
</style></head><body><h1>Data path</h1><p>{summary}</p>
<table><tr>{header}</tr>{rows}</table>
<h2>Pairs a second, on a logarithmic scale</h2><table>{bars}</table>
<h2>Rows</h2><pre>{report}</pre></body></html>
"""


def _page(result: dict[str, Any]) -> str:
    """A page that needs nothing from outside."""
    stages = result["stages"]

    def row(cells: Sequence[str], tag: str = "td") -> str:
        return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)

    top = max(np.log10(max(stage["pairs_per_s"], 10)) for stage in stages)
    bars = []
    for stage in stages:
        width = 100 * np.log10(max(stage["pairs_per_s"], 1)) / top
        name = html.escape(stage["name"])
        bar = f'<div class="bar" style="width:{width:.1f}%"></div>'
        bars.append(f'<tr><td style="width:14em">{name}</td><td>{bar}</td></tr>')
    counts = {key: result["report"][key] for key in ("read", "kept", "dropped", "warned")}
    return PAGE.format(
        summary=html.escape(_summary(result)),
        header=row(HEADER, "th"),
        rows="".join(f"<tr>{row(_cells(stage))}</tr>" for stage in stages),
        bars="".join(bars),
        report=html.escape(dumps(counts, indent=2)),
    )
