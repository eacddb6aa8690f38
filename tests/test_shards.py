"""Files that need not fit in memory: encoded in parts, kept in a cache, mapped."""

import numpy as np
import pytest
import tiny

from dpo_ext import DataError, PairDataset, Tokenizer, _core
from dpo_ext.options import settings


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("transformers")
    return Tokenizer.from_pretrained(tiny.tokenizer())


def options(**changes):
    defaults = {"limits": None, "threads": 1}
    return settings({**defaults, **changes})


def parts(files, tokenizer, pairs, **changes):
    encoder = _core.FileEncoder([str(f) for f in files], tokenizer._core, options(**changes))
    out = []
    while (raw := encoder.next(pairs)) is not None:
        out.append(raw)
    return out


def test_parts_together_are_the_whole(tmp_path, tokenizer):
    rows = tiny.rows(6000)
    rows[4100]["chosen"] = ""  # in the second block of the first file
    rows[5999]["rejected"] = " "
    files = [
        tiny.write_jsonl(tmp_path / "a.jsonl", rows[:5000]),
        tiny.write_jsonl(tmp_path / "b.jsonl.gz", rows[5000:]),
    ]
    whole = PairDataset.from_files(files, tokenizer, on_bad="skip")
    got = parts(files, tokenizer, 100, on_bad="skip")
    assert len(got) > 2
    for name in ("prompt", "chosen", "rejected"):
        values = np.concatenate([raw[name][0] for raw in got])
        lengths = np.concatenate([np.diff(raw[name][1]) for raw in got])
        expected = getattr(whole, f"{name}_ids")
        assert np.array_equal(values, expected.values)
        assert np.array_equal(lengths, expected.lengths)
    assert np.array_equal(np.concatenate([raw["rows"] for raw in got]), whole.rows)
    assert sum(raw["read"] for raw in got) == 6000
    assert sum(raw["dropped"].get("empty_completion", 0) for raw in got) == 2


def test_an_encoder_that_failed_refuses_to_go_on(tmp_path, tokenizer):
    file = tiny.write_jsonl(tmp_path / "a.jsonl", [{"chosen": 1}])
    encoder = _core.FileEncoder([str(file)], tokenizer._core, options())
    with pytest.raises(DataError):
        encoder.next(1)
    with pytest.raises(ValueError, match="failed"):
        encoder.next(1)
