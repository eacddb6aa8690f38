"""`bench_data`: how fast a file of preference pairs becomes batches, stage by stage, beside its
peers.

The ids are compared before a peer is timed; peers run in the same process, on the same texts.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from datetime import datetime
from errno import EACCES, EISDIR, ENOENT, ENOTDIR
from importlib.metadata import version
from json import dumps
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from dpo_ext import _core
from dpo_ext.bench import report
from dpo_ext.bench.machine import machine
from dpo_ext.bench.peers import same_ids, tokenizers_peer, trl_times
from dpo_ext.data.dataset import PairDataset
from dpo_ext.data.files import by_kind, opened_up
from dpo_ext.data.nothing import no_pairs
from dpo_ext.data.options import Options, Paths, settings
from dpo_ext.data.tokenizer import Tokenizer
from dpo_ext.layout.batch import LAYOUTS, Layout
from dpo_ext.layout.plan import BatchPlan

PAIRS_PER_BATCH = 64
BIN_LENGTH = 8192
FIRST = ", first pass"
"""Behind the name of a stage."""
# `ru_maxrss` counts kilobytes, on macOS bytes.
DARWIN = sys.platform == "darwin"


@dataclass(frozen=True)
class Stage:
    """One row of the table. Rates are of the median; times are seconds for the whole input.

    Attributes:
        name: what was timed.
        seconds: the median of the repeats.
        fastest, slowest: its spread.
        pairs_per_s, tokens_per_s, mb_per_s: of the pairs read, of the ids of both sides with their
            prompts, and of the text of the file (10^6 bytes); None where a stage has no such thing.
        peer: somebody else's code.
    """

    name: str
    seconds: float
    fastest: float
    slowest: float
    pairs_per_s: float
    tokens_per_s: float | None
    mb_per_s: float | None
    peer: bool


def bench_data(
    files: Paths,
    tokenizer_dir: str | PathLike[str],
    *,
    repeats: int = 5,
    peer_pairs: int = 5000,
    out: str | PathLike[str] | None = None,
    json: str | PathLike[str] | None = None,
    show: bool = True,
    **options: Unpack[Options],
) -> dict[str, Any]:
    """Times the data path on a user's own file and tokenizer.

    Stages: reading and parsing alone; encoding alone, of prompt + chosen and prompt + rejected;
    rows to ids, the whole of :meth:`PairDataset.from_files`; batches of 64 pairs, padded and packed
    in one row; the whole way from the file to those batches, on a first pass and on repeats. A
    first pass is what a user sees: each of its times is of a tokenizer that was loaded for it and
    has seen no text. Beside them, in the same process and
    after their ids have been compared with ours: the Python package ``tokenizers``
    (``encode_batch_fast`` on the same texts, with its own threads if ``threads`` is not 1), and
    TRL's own preparation and collator, where they are installed.

    Args:
        files: as for :meth:`PairDataset.from_files`.
        tokenizer_dir: a model's folder.
        repeats: of each of our stages and of ``tokenizers``; the median counts. TRL runs twice
            with a tokenizer loaded for it: its first pass and its repeat.
        peer_pairs: the peers see at most this many pairs, the first; rates are by pair.
        out: where to write a page with the table and plots, without any link to the outside.
        json: where to write the result as JSON.
        show: print the table; needs rich.
        options: those of :meth:`PairDataset.from_files`, but by default bad rows are skipped, no
            side is cut, and one thread works (None for what ``from_files`` takes by itself). TRL
            runs with the same names of fields and the same ``max_length``, and only where it knows
            the ``truncation``.

    Returns:
        dict: ``stages`` (list of :class:`Stage` as dicts), ``pairs``, ``kept``, ``tokens``,
            ``bytes``, ``fill`` by layout, ``lengths`` (a histogram), ``ids_equal`` and ``trl``
            (None without the peer; its ``times`` and ``times_padded`` are of first passes),
            ``report``, ``engine``, ``cold_seconds`` (file to ids, the first of the process),
            ``load_seconds``, ``peak_mb`` (of the process before the peers), and what it ran on:
            ``files``, ``tokenizer``, ``options``, ``machine`` with the versions, ``date``.

    Raises:
        DataError: no row gives a pair (``no_pairs``), or as :meth:`PairDataset.from_files`.
        FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError: ``out`` or
            ``json`` cannot be written there; found before anything is timed.
        ValueError: a scalar out of range.  TypeError: an unknown option.
        DpoExtError: our ids differ from those of ``tokenizers``.
    """
    for name, value in (("repeats", repeats), ("peer_pairs", peer_pairs)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, found {value}")
    for target in (out, json):
        if target is not None:
            _check_place(Path(target))
    options = {"on_bad": "skip", "max_length": None, "threads": 1, **options}
    checked = settings(options)
    paths = opened_up(files)
    load_seconds, tokenizer = _once(lambda: Tokenizer.from_pretrained(tokenizer_dir))

    def whole() -> PairDataset:
        return PairDataset.from_files(paths, tokenizer, **options)

    cold_seconds, pairs = _once(whole)
    if len(pairs) == 0:
        raise no_pairs(paths, pairs.report)
    timed_layouts: tuple[Layout, ...] = ("padded", "packed")
    plans = {
        layout: pairs.plan(layout=layout, pairs_per_batch=PAIRS_PER_BATCH)
        for layout in timed_layouts
    }
    texts = _texts(pairs, tokenizer, min(len(pairs), peer_pairs))
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    length = sum(len(text.encode()) for text in texts)
    names = _core.PairEncoder(tokenizer._core, checked).names
    # What pyarrow reads is not parsed by us, and has no bytes of text.
    is_text = {kind for kind, _ in by_kind(paths, names, checked.limits)} == {"lines"}
    scanned, size = _core.scan(paths, tokenizer.vocab_size, checked) if is_text else (0, None)
    n, m, tokens = pairs.report.read, len(pairs), int(pairs.tokens.sum())
    some = len(texts) // 2

    def stage(
        name: str, work: Callable[[], Any], count: int, ids: int | None, text: int | None
    ) -> Stage:
        return _stage(name, [_once(work)[0] for _ in range(repeats)], count, ids, text)

    def scan() -> None:
        _core.scan(paths, tokenizer.vocab_size, checked)

    def encode() -> None:
        tokenizer.encode_batch(texts, add_special_tokens=False, threads=options["threads"])

    def file_to_batches(layout: Layout) -> None:
        for _ in whole().plan(layout=layout, pairs_per_batch=PAIRS_PER_BATCH):
            pass

    first = _first_passes(tokenizer_dir, paths, options, timed_layouts, repeats)
    stages = [
        *([stage("read and parse", scan, scanned, None, size)] if is_text else []),
        stage(f"encode, {tokenizer.engine}", encode, some, len(encoded.values), length),
        _stage(f"file to ids{FIRST}", first["ids"], n, tokens, size),
        stage("file to ids", whole, n, tokens, size),
        stage("padded batches of 64", lambda: [None for _ in plans["padded"]], m, tokens, None),
        stage("packed batches of 64", lambda: [None for _ in plans["packed"]], m, tokens, None),
        _stage(f"file to padded batches{FIRST}", first["padded"], n, tokens, size),
        stage("file to padded batches", lambda: file_to_batches("padded"), n, tokens, size),
        _stage(f"file to packed batches{FIRST}", first["packed"], n, tokens, size),
        stage("file to packed batches", lambda: file_to_batches("packed"), n, tokens, size),
    ]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if DARWIN else 2**10)
    of = {shown.name: shown for shown in stages}
    peer = tokenizers_peer(tokenizer, options["threads"])
    ids_equal = None if peer is None else same_ids(peer, encoded, texts)
    if peer is not None:
        timed = [_once(lambda: peer(texts))[0] for _ in range(repeats)]
        name = "encode, peer: tokenizers"
        stages.append(_stage(name, timed, some, len(encoded.values), length, peer=True))
    uncut = pairs
    if options["max_length"] is not None:
        as_read: Options = {**options, "max_length": None}
        uncut = PairDataset.from_files(paths, tokenizer, **as_read)
    trl = None
    if is_text:
        trl = trl_times(paths, tokenizer_dir, uncut, some, PAIRS_PER_BATCH, options)
    if trl is not None:
        for which, times in ((FIRST, trl.first), ("", trl.again)):
            steps = {
                f"rows to ids{which}, peer: TRL": times.prepare_seconds,
                f"padded batches of 64{which}, peer: TRL": times.collate_seconds,
                f"rows to padded batches{which}, peer: TRL": times.seconds,
            }
            for name, seconds in steps.items():
                stages.append(_stage(name, [seconds], trl.pairs, trl.tokens, None, peer=True))
    counts, edges = np.histogram(pairs.longest, bins=_edges(int(pairs.longest.max())))
    result = {
        "stages": [asdict(s) for s in stages],
        "pairs": n,
        "kept": m,
        "tokens": tokens,
        "bytes": size or 0,
        "fill": _fill(pairs, plans),
        "lengths": {"counts": counts.tolist(), "edges": edges.tolist()},
        "ids_equal": ids_equal,
        "trl": None
        if trl is None
        else {
            **asdict(trl),
            "version": version("trl"),
            "times": of[f"file to packed batches{FIRST}"].pairs_per_s
            / (trl.pairs / trl.first.seconds),
            "times_padded": of[f"file to padded batches{FIRST}"].pairs_per_s
            / (trl.pairs / trl.first.seconds),
        },
        "engine": tokenizer.engine,
        "vocab_size": tokenizer.vocab_size,
        "threads": options["threads"],
        "repeats": repeats,
        "load_seconds": load_seconds,
        "cold_seconds": cold_seconds,
        "peak_mb": peak,
        "report": pairs.report.to_dict(),
        "files": paths,
        "tokenizer": str(tokenizer_dir),
        "options": {name: _plain(value) for name, value in options.items()},
        "machine": machine(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    if show:
        report.show(result)
    if json is not None:
        Path(json).write_text(dumps(result, indent=2) + "\n", encoding="utf-8")
    if out is not None:
        Path(out).write_text(report.render(result), encoding="utf-8")
    return result


def _first_passes(
    folder: str | PathLike[str],
    paths: Any,
    options: Options,
    layouts: Sequence[Layout],
    repeats: int,
) -> dict[str, list[float]]:
    """Seconds of the whole file by tokenizers that have seen no text: to ids, and to the batches of
    each layout; loading is not in them.
    """
    found: dict[str, list[float]] = {name: [] for name in ("ids", *layouts)}
    for _ in range(repeats):
        tokenizer = Tokenizer.from_pretrained(folder)
        start = time.perf_counter()
        pairs = PairDataset.from_files(paths, tokenizer, **options)
        to_ids = time.perf_counter() - start
        found["ids"].append(to_ids)
        for layout in layouts:
            start = time.perf_counter()
            for _batch in pairs.plan(layout=layout, pairs_per_batch=PAIRS_PER_BATCH):
                pass
            found[layout].append(to_ids + time.perf_counter() - start)
    return found


def _check_place(path: Path) -> None:
    """Whether a file can be written there, known before minutes are spent on its content."""
    folder = path.parent
    if not folder.exists():
        raise FileNotFoundError(ENOENT, "no such folder", str(folder))
    if not folder.is_dir():
        raise NotADirectoryError(ENOTDIR, "not a folder", str(folder))
    if path.is_dir():
        raise IsADirectoryError(EISDIR, "expected a file, found a folder", str(path))
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise PermissionError(EACCES, "no permission to write there", str(path))


def _fill(pairs: PairDataset, plans: Mapping[Layout, BatchPlan]) -> dict[str, float]:
    """Real tokens of all slots, by layout: of the batches that are timed, and of long rows."""
    fill = {f"{name}, {PAIRS_PER_BATCH} pairs": plan.stats.fill for name, plan in plans.items()}
    budget = max(BIN_LENGTH, int(pairs.tokens.max()))
    for layout in (name for name in LAYOUTS if name != "padded"):
        plan = pairs.plan(layout=layout, tokens_per_batch=budget)
        fill[f"{layout}, bins of {budget:,}"] = plan.stats.fill
    return fill


def _plain(value: Any) -> Any:
    """An option as JSON has it."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value if value is None or isinstance(value, int | str) else list(value)


def _stage(
    name: str, times: list[float], pairs: int, ids: int | None, text: int | None, peer: bool = False
) -> Stage:
    middle = statistics.median(times)
    return Stage(
        name=name,
        seconds=middle,
        fastest=min(times),
        slowest=max(times),
        pairs_per_s=pairs / middle,
        tokens_per_s=None if ids is None else ids / middle,
        mb_per_s=None if text is None else text / middle / 1e6,
        peer=peer,
    )


def _edges(longest: int) -> list[int]:
    """Borders of at most 20 bins for lengths up to ``longest``, at round numbers."""
    power = 1
    while True:
        for width in (power, 2 * power, 5 * power):
            if longest < 20 * width:
                return list(range(0, longest + 1 + width, width))
        power *= 10


def _once(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def _texts(pairs: PairDataset, tokenizer: Tokenizer, count: int) -> list[str]:
    """Prompt + completion of both sides of the first pairs, spelt out from the ids."""
    prompts = pairs.prompt_ids[:count]
    sides = (pairs.chosen_ids[:count], pairs.rejected_ids[:count])
    return [
        tokenizer.decode(np.concatenate([prompt, ids]))
        for side in sides
        for prompt, ids in zip(prompts, side, strict=True)
    ]
