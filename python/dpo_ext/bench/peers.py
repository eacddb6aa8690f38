"""What others need for the same work, run in our process: `tokenizers`, and TRL's data path."""

from __future__ import annotations

import contextlib
import gzip
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from dpo_ext.data.dataset import PairDataset
from dpo_ext.data.options import Options
from dpo_ext.data.tokenizer import Tokenizer
from dpo_ext.errors import DpoExtError
from dpo_ext.pairs import Ragged

TRUNCATIONS = ("keep_start", "keep_end")  # those of TRL
Encode = Callable[[Sequence[str]], list[Any]]


def tokenizers_peer(tokenizer: Tokenizer, threads: int | None) -> Encode | None:
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


def same_ids(peer: Encode, ours: Ragged, texts: Sequence[str]) -> bool:
    """Same ids for every text, or an error that says for which."""
    for i, (mine, theirs) in enumerate(zip(ours, peer(texts), strict=True)):
        if mine.tolist() != theirs.ids:
            found = f"{len(mine)} ids, the peer {len(theirs.ids)} others"
            raise DpoExtError(f"text {i}: {found}")
    return True


@dataclass(frozen=True)
class TrlPass:
    """One pass of TRL over a file.

    Attributes:
        prepare_seconds: its `map` passes: prompt, EOS, tokens.
        collate_seconds: its collator on batches of the prepared rows.
    """

    prepare_seconds: float
    collate_seconds: float

    @property
    def seconds(self) -> float:
        """Of both."""
        return self.prepare_seconds + self.collate_seconds


@dataclass(frozen=True)
class TrlTimes:
    """Two passes of TRL over a file, by a tokenizer that had seen no text before the first.

    Attributes:
        pairs: rows that went through.
        tokens: ids of both sides with their prompts.
        first, again: what each took.
        same: pairs whose ids of prompt + chosen and of prompt + rejected are ours.
    """

    pairs: int
    tokens: int
    first: TrlPass
    again: TrlPass
    same: int


def trl_times(
    paths: Sequence[str],
    folder: str | PathLike[str],
    ours: PairDataset,
    pairs: int,
    pairs_per_batch: int,
    options: Options,
) -> TrlTimes | None:
    """TRL's own preparation and collator on the rows of our first `pairs` pairs.

    None without TRL, where a file is not JSONL, or where TRL has no such truncation. The rows are
    parsed before the clock starts, and nothing comes from a cache. TRL cuts in its collator, so
    `ours` must not be cut for its ids to be compared.
    """
    max_length, truncation = options.get("max_length"), options.get("truncation", "keep_start")
    if max_length is not None and truncation not in TRUNCATIONS:
        return None
    try:
        import datasets
        from transformers import AutoTokenizer
        from trl import DPOTrainer
        from trl.trainer.dpo_trainer import DataCollatorForPreference
    except ImportError:
        return None
    lines = _lines(paths, ours.rows[:pairs])
    if lines is None:
        return None
    theirs = AutoTokenizer.from_pretrained(fspath(folder))
    if theirs.pad_token is None:
        theirs.pad_token = theirs.eos_token or theirs.convert_ids_to_tokens(0)
    args: Any = SimpleNamespace(
        dataset_num_proc=None, max_length=None, truncation_mode="keep_start"
    )
    trainer: Any = SimpleNamespace(_tokenizer=theirs)
    with tempfile.TemporaryDirectory() as cache, _quiet(datasets):
        path = Path(cache, "rows.jsonl")
        path.write_text("".join(lines), encoding="utf-8")
        table = datasets.load_dataset(
            "json", data_files=str(path), split="train", cache_dir=str(path.with_name("cache"))
        )
        table = _named(table, options)
        collator = DataCollatorForPreference(
            pad_token_id=theirs.pad_token_id, max_length=max_length, truncation_mode=truncation
        )

        def timed() -> tuple[TrlPass, Any]:
            start = time.perf_counter()
            with datasets_without_cache(datasets):
                prepared = DPOTrainer._prepare_dataset(trainer, table, theirs, args, "train")  # noqa: SLF001
            middle = time.perf_counter()
            for first in range(0, len(prepared), pairs_per_batch):
                last = min(first + pairs_per_batch, len(prepared))
                collator([prepared[i] for i in range(first, last)])
            end = time.perf_counter()
            return TrlPass(middle - start, end - middle), prepared

        (first, prepared), (again, _) = timed(), timed()
        ids = prepared.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
        tokens, same = _compare(ids, ours)
    return TrlTimes(len(lines), tokens, first, again, same)


@contextlib.contextmanager
def datasets_without_cache(datasets: Any) -> Iterator[None]:
    """No pass is answered by the files of an earlier one."""
    was_enabled = datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        yield
    finally:
        if was_enabled:
            datasets.enable_caching()


def _named(table: Any, options: Options) -> Any:
    """The table with TRL's names of the fields."""
    ours = {
        options.get("prompt_key"): "prompt",
        options.get("chosen_key"): "chosen",
        options.get("rejected_key"): "rejected",
    }
    names = {name: theirs for name, theirs in ours.items() if name not in (None, theirs)}
    in_the_way = [name for name in names.values() if name in table.column_names]
    return table.remove_columns(in_the_way).rename_columns(names)


def _compare(prepared: Any, ours: PairDataset) -> tuple[int, int]:
    """Tokens of TRL's rows, and in how many of them both sides are ours."""
    tokens = same = 0
    for theirs, mine in zip(prepared, ours, strict=False):
        sides = [theirs["prompt_ids"] + theirs[name] for name in ("chosen_ids", "rejected_ids")]
        tokens += sum(map(len, sides))
        same += sides == [
            np.concatenate([mine["prompt_ids"], mine[name]]).tolist()
            for name in ("chosen_ids", "rejected_ids")
        ]
    return tokens, same


def _lines(paths: Sequence[str], rows: Any) -> list[str] | None:
    """The lines of rows number `rows`, ascending, of JSONL files; None if one is something else."""
    wanted = {int(row) for row in rows}
    found: list[str] = []
    row = -1
    for path in paths:
        with Path(path).open("rb") as file:
            magic = file.read(4)
        if magic in (b"PAR1", b"ARRO", b"\x28\xb5\x2f\xfd") or Path(path).is_dir():
            return None
        opener = gzip.open if magic[:2] == b"\x1f\x8b" else open
        with opener(path, "rt", encoding="utf-8-sig", newline="\n", errors="replace") as lines:
            for line in lines:
                if line.lstrip(" \t\r\n").startswith("["):  # an array of rows
                    return None
                row += bool(line.strip())
                if row in wanted and line.strip():
                    found.append(line.rstrip("\r\n") + "\n")
                if len(found) == len(wanted):
                    return found
    return found


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No bars and no log lines of the hosts; both are as before afterwards."""
    loggers = [
        logging.getLogger(name) for name in ("trl", "transformers", "datasets", "accelerate")
    ]
    levels = [logger.level for logger in loggers]
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
