"""`prepare` takes what `from_files` takes, and each of its options acts."""

import inspect
import json
from datetime import datetime
from typing import get_type_hints

import pytest
from byte_tokenizer import TEMPLATE, tokenizer

from dpo_ext import DataError, Limits, PairDataset, prepare
from dpo_ext.data.options import Options

pytest.importorskip("pyarrow")

DATED = (
    "{{ strftime_now('%Y') }}{{ style }}{% if tools %}{{ tools | tojson }}{% endif %}" + TEMPLATE
)
TEXT = {"prompt": "the prompt", "chosen": "a longer answer", "rejected": "no"}
CHAT = {
    "prompt": [{"role": "user", "content": "hi"}],
    "chosen": [
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "<think>\n\n</think>\n\nyes"},
    ],
    "rejected": [{"role": "assistant", "content": "<think>\n\n</think>\n\nno"}],
}
THINK = {**CHAT, "chosen": [{"role": "assistant", "content": "<think>\n\n</think>\n\nyes"}]}
PICTURE = {
    **CHAT,
    "prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}],
}
# Each option, a row that it changes, and the value.
ACTS = {
    "max_length": (TEXT, 12),
    "truncation": ({**TEXT, "prompt": "xy" * 600}, "keep_completions"),
    "boundary": ({**TEXT, "prompt": "hel", "chosen": "lo"}, "separate"),
    "on_bad": ({**TEXT, "chosen": 1}, "skip"),
    "special_tokens_in_text": ({**TEXT, "prompt": "x<|turn|>"}, "text"),
    "prompt_key": ({**TEXT, "other": "another"}, "other"),
    "chosen_key": ({**TEXT, "other": "another"}, "other"),
    "rejected_key": ({**TEXT, "other": "another"}, "other"),
    "columns": ({**TEXT, "other": 1}, ("other",)),
    "ignore_columns": ({**TEXT, "chosen_weights": [[0, 1, 0.5]]}, ("chosen_weights",)),
    "layout_of_rows": ({"chosen": "Paris ", "rejected": "London"}, "completions"),
    "images": (PICTURE, "ignore"),
    "keep_nulls": (None, True),
    "chat_template_kwargs": (CHAT, {"style": "brief"}),
    "on_useless": ({**TEXT, "rejected": TEXT["chosen"]}, "keep"),
    "empty_think": (THINK, "prompt"),
    "train_on": (CHAT, "last"),
    "now": (CHAT, datetime(2020, 1, 1)),
    "limits": (TEXT, Limits(max_line_bytes=8)),
    "threads": (TEXT, 0),
}


def outcome(call):
    """What a call gives, or the error."""
    try:
        pairs = call()
    except (DataError, ValueError) as error:
        return type(error).__name__, getattr(error, "reason", str(error))
    ids = [ragged.tolist() for ragged in (pairs.prompt_ids, pairs.chosen_ids, pairs.rejected_ids)]
    weights = [side.tolist() for side in pairs.weights.values()]
    columns = {name: column.tolist() for name, column in pairs.columns.items()}
    return ids, weights, columns, pairs.report.warned, pairs.report.dropped


def write_rows(folder, row):
    if row is not None:
        path = folder / "rows.jsonl"
        # One that is always kept.
        path.write_text(json.dumps(row) + "\n" + json.dumps({**row, **TEXT}) + "\n")
        return path
    import pyarrow as pa
    import pyarrow.parquet as pq

    sides = [[{"role": "assistant", "content": text}] for text in "ab"]
    tools = [[{"name": "f", "strict": strict}] for strict in (None, True)]
    path = folder / "rows.parquet"
    columns = {"prompt": CHAT["prompt"], "chosen": sides[0], "rejected": sides[1]}
    table = {name: [turns, turns] for name, turns in columns.items()} | {"tools": tools}
    pq.write_table(pa.table(table), path)
    return path


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("tokenizer") / "m", template=DATED)


def test_prepare_has_the_parameters_of_from_files():
    theirs = inspect.signature(PairDataset.from_files).parameters
    ours = inspect.signature(prepare).parameters
    apart = {"paths": "files"}
    assert {apart.get(name, name) for name in theirs} <= set(ours)
    assert get_type_hints(prepare)["options"] == get_type_hints(PairDataset.from_files)["options"]
    assert set(ACTS) == set(Options.__annotations__)


@pytest.mark.parametrize("option", ACTS)
@pytest.mark.parametrize("cached", [False, True], ids=["", "cached"])
def test_every_option_acts_as_in_from_files(tmp_path, tok, option, cached):
    row, value = ACTS[option]
    path = write_rows(tmp_path, row)
    plain = {"cache_dir": tmp_path / "cache"} if cached else {}
    wanted = outcome(lambda: PairDataset.from_files(path, tok, **{option: value}))

    def prepared():
        prepare(path, tok, tmp_path / "out", **plain, **{option: value})
        return PairDataset.load(tmp_path / "out")

    assert outcome(prepared) == wanted
    assert wanted != outcome(lambda: PairDataset.from_files(path, tok)), "it changes nothing"


def test_a_cached_preparation_is_encoded_once(tmp_path, tok, monkeypatch):
    from dpo_ext.data import cache

    calls = []
    real = cache.encode_into
    monkeypatch.setattr(cache, "encode_into", lambda *a: calls.append(1) or real(*a))
    path = write_rows(tmp_path, TEXT)
    cache_dir = tmp_path / "cache"
    reports = [prepare(path, tok, tmp_path / out, cache_dir=cache_dir) for out in "ab"]
    assert len(calls) == 1
    assert reports[0] == reports[1] == PairDataset.load(tmp_path / "b").report


def test_no_pairs_are_an_empty_data_set_with_a_cache_too(tmp_path, tok):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**TEXT, "rejected": TEXT["chosen"]}) + "\n")
    skip = {"on_bad": "skip"}
    for more in ({}, {"cache_dir": tmp_path / "cache"}):
        assert prepare(path, tok, tmp_path / "out", **skip, **more).kept == 0
        with pytest.raises(DataError) as caught:
            prepare(path, tok, tmp_path / "out", allow_empty=False, **skip, **more)
        assert caught.value.reason == "no_pairs"
