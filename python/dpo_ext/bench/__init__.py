"""`bench_data`: how fast a file of preference pairs becomes batches, stage by stage, beside its
peers.

The ids are compared before a peer is timed; peers run in the same process, on the same texts.
"""

from __future__ import annotations

import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from json import dumps
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from dpo_ext import _core
from dpo_ext.bench.peers import same_ids, tokenizers_peer, trl_times
from dpo_ext.data.dataset import PairDataset
from dpo_ext.data.files import opened_up
from dpo_ext.data.options import Limits, Paths, Settings, default_threads
from dpo_ext.data.tokenizer import Tokenizer
from dpo_ext.layout.batch import LAYOUTS
from dpo_ext.pages import bench_page as page

PAIRS_PER_BATCH = 64
BIN_LENGTH = 8192
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
    threads: int | None = 1,
    repeats: int = 5,
    peer_pairs: int = 5000,
    out: str | PathLike[str] | None = None,
    json: str | PathLike[str] | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Times the data path on a user's own file and tokenizer.

    Stages: reading and parsing alone; encoding alone, of prompt + chosen and prompt + rejected;
    rows to ids, the whole of :meth:`PairDataset.from_files`; batches of 64 pairs, padded and packed
    in one row; the whole way from the file to those batches. Beside them, in the same process and
    after their ids have been compared with ours: the Python package ``tokenizers``
    (``encode_batch_fast`` on the same texts, with its own threads if ``threads`` is not 1), and
    TRL's own preparation and collator, where they are installed.

    Args:
        files: as for :meth:`PairDataset.from_files`; bad rows are skipped.
        tokenizer_dir: a model's folder.
        threads: of our stages; None for what :meth:`PairDataset.from_files` takes by itself.
        repeats: of each of our stages and of ``tokenizers``; the median counts. TRL runs once.
        peer_pairs: the peers see at most this many pairs, the first; rates are by pair.
        out: where to write a page with the table and plots, without any link to the outside.
        json: where to write the result as JSON.
        show: print the table; needs rich.

    Returns:
        dict: ``stages`` (list of :class:`Stage` as dicts), ``pairs``, ``kept``, ``tokens``,
            ``bytes``, ``fill`` by layout, ``lengths`` (a histogram), ``ids_equal`` and ``trl``
            (None without the peer), ``report``, ``engine``, ``cold_seconds``, ``load_seconds``,
            ``peak_mb`` (of the process before the peers), and what it ran on.

    Raises:
        ValueError: a scalar out of range, or no row gives a pair.
        DpoExtError: our ids differ from those of ``tokenizers``.
    """
    for name, value in (("repeats", repeats), ("peer_pairs", peer_pairs)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, found {value}")
    default_threads(threads)
    paths = opened_up(files)
    load_seconds, tokenizer = _once(lambda: Tokenizer.from_pretrained(tokenizer_dir))

    def whole() -> PairDataset:
        return PairDataset.from_files(
            paths, tokenizer, on_bad="skip", threads=threads, max_length=None
        )

    cold_seconds, pairs = _once(whole)
    if len(pairs) == 0:
        raise ValueError(f"no row of {paths} gives a pair: {pairs.report}")
    plans = {
        layout: pairs.plan(layout=layout, pairs_per_batch=PAIRS_PER_BATCH)
        for layout in ("padded", "packed")
    }
    fill = {f"{name}, {PAIRS_PER_BATCH} pairs": plan.stats.fill for name, plan in plans.items()}
    for layout in (name for name in LAYOUTS if name != "padded"):
        budget = max(BIN_LENGTH, int(pairs.tokens.max()))
        plan = pairs.plan(layout=layout, tokens_per_batch=budget)
        fill[f"{layout}, bins of {budget:,}"] = plan.stats.fill

    def file_to_batches(layout: str) -> None:
        for _ in whole().plan(layout=layout, pairs_per_batch=PAIRS_PER_BATCH):
            pass

    some = min(len(pairs), peer_pairs)
    texts = _texts(pairs, tokenizer, some)
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    length = sum(len(text.encode()) for text in texts)
    settings = Settings(limits=Limits(), threads=threads, on_bad="skip")
    scanned, size = _core.scan(paths, tokenizer.vocab_size, settings)
    n, m, tokens = pairs.report.read, len(pairs), int(pairs.tokens.sum())

    def stage(
        name: str, work: Callable[[], Any], count: int, ids: int | None, text: int | None
    ) -> Stage:
        return _stage(name, [_once(work)[0] for _ in range(repeats)], count, ids, text)

    def scan() -> None:
        _core.scan(paths, tokenizer.vocab_size, settings)

    def encode() -> None:
        tokenizer.encode_batch(texts, add_special_tokens=False, threads=threads)

    stages = [
        stage("read and parse", scan, scanned, None, size),
        stage(f"encode, {tokenizer.engine}", encode, some, len(encoded.values), length),
        stage("file to ids", whole, n, tokens, size),
        stage("padded batches of 64", lambda: [None for _ in plans["padded"]], m, tokens, None),
        stage("packed batches of 64", lambda: [None for _ in plans["packed"]], m, tokens, None),
        stage("file to padded batches", lambda: file_to_batches("padded"), n, tokens, size),
        stage("file to packed batches", lambda: file_to_batches("packed"), n, tokens, size),
    ]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if DARWIN else 2**10)
    to_padded, to_packed = stages[-2:]
    peer = tokenizers_peer(tokenizer, threads)
    ids_equal = None if peer is None else same_ids(peer, encoded, texts)
    if peer is not None:
        timed = [_once(lambda: peer(texts))[0] for _ in range(repeats)]
        name = "encode, peer: tokenizers"
        stages.append(_stage(name, timed, some, len(encoded.values), length, peer=True))
    trl = trl_times(paths, str(tokenizer_dir), pairs, some, PAIRS_PER_BATCH)
    if trl is not None:
        steps = {
            "rows to ids, peer: TRL": trl.prepare_seconds,
            "padded batches of 64, peer: TRL": trl.collate_seconds,
            "rows to padded batches, peer: TRL": trl.prepare_seconds + trl.collate_seconds,
        }
        for name, seconds in steps.items():
            stages.append(_stage(name, [seconds], trl.pairs, trl.tokens, None, peer=True))
    counts, edges = np.histogram(pairs.longest, bins=_edges(int(pairs.longest.max())))
    result = {
        "stages": [asdict(s) for s in stages],
        "pairs": n,
        "kept": m,
        "tokens": tokens,
        "bytes": size,
        "fill": fill,
        "lengths": {"counts": counts.tolist(), "edges": edges.tolist()},
        "ids_equal": ids_equal,
        "trl": None
        if trl is None
        else {
            **asdict(trl),
            "version": version("trl"),
            "times": to_packed.pairs_per_s / stages[-1].pairs_per_s,
            "times_padded": to_padded.pairs_per_s / stages[-1].pairs_per_s,
        },
        "engine": tokenizer.engine,
        "threads": threads,
        "repeats": repeats,
        "load_seconds": load_seconds,
        "cold_seconds": cold_seconds,
        "peak_mb": peak,
        "report": pairs.report.to_dict(),
        "files": paths,
        "tokenizer": str(tokenizer_dir),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    if show:
        page.show(result)
    if json is not None:
        Path(json).write_text(dumps(result, indent=2) + "\n", encoding="utf-8")
    if out is not None:
        Path(out).write_text(page.page(result), encoding="utf-8")
    return result


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
    """Borders of at most 24 bins of equal width for lengths up to ``longest``."""
    width = max(1, -(-(longest + 1) // 24))
    return list(range(0, longest + 1 + width, width))


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
