"""A folder of shards stands for the data files in it; what else is there is never passed over in silence."""

from __future__ import annotations

import pytest
import tiny
from byte_tokenizer import write_folder

from dpo_ext import DataError, PairDataset, Tokenizer
from dpo_ext.data.files import SUFFIXES, sources

ROWS = tiny.rows(12)


@pytest.fixture
def tok(tmp_path):
    return Tokenizer.from_pretrained(write_folder(tmp_path / "model"))


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    tiny.write_jsonl(folder / "b.jsonl", ROWS[4:8])
    tiny.write_jsonl(folder / "a.jsonl.gz", ROWS[:4])
    tiny.write_jsonl(folder / "C.NDJSON", ROWS[8:])
    return folder


def names(folder):
    return [path.rpartition("/")[2] for path in sources(folder).files]


def test_a_folder_is_its_files_in_the_order_of_their_names(shards, tok):
    assert names(shards) == ["C.NDJSON", "a.jsonl.gz", "b.jsonl"]
    got = PairDataset.from_files(shards, tok)
    want = PairDataset.from_rows([*ROWS[8:], *ROWS[:8]], tok)
    assert got.prompt_ids == want.prompt_ids
    assert got.report.notes == want.report.notes
    again = PairDataset.from_files(f"{shards}/", tok)
    assert again.chosen_ids == want.chosen_ids


def test_hidden_names_are_passed_over_and_others_are_named(shards, tok, tmp_path):
    for name in (".hidden.jsonl", "_SUCCESS", "README.md", "dataset_info.json"):
        (shards / name).write_text("no data\n")
    (shards / "more").mkdir()
    tiny.write_jsonl(shards / "more" / "d.jsonl", ROWS)
    assert names(shards) == ["C.NDJSON", "a.jsonl.gz", "b.jsonl"]
    note = f"{shards}: not read are README.md, dataset_info.json, more"
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        assert note in PairDataset.from_files(shards, tok, cache_dir=cache).report.notes


def test_the_note_is_of_this_call_and_not_of_the_cache(shards, tok, tmp_path):
    files = sources(shards).files
    (shards / "README.md").write_text("no data\n")
    for paths, expected in ((shards, 1), (files, 0), (shards, 1)):
        report = PairDataset.from_files(paths, tok, cache_dir=tmp_path / "cache").report
        assert sum("README.md" in note for note in report.notes) == expected


def test_prepare_says_the_same_of_a_folder(shards, tok, tmp_path):
    from dpo_ext.data.prepare import prepare

    pytest.importorskip("pyarrow")
    (shards / "README.md").write_text("no data\n")
    assert prepare(shards, tok, tmp_path / "out") == PairDataset.from_files(shards, tok).report


def test_a_folder_without_data_files_says_which_names_are_read(tmp_path, tok):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError) as caught:
        PairDataset.from_files(empty, tok)
    assert all(suffix in str(caught.value) for suffix in SUFFIXES)
    assert "it is empty" in str(caught.value)
    assert caught.value.reason == "bad_input"
    (empty / "data.json").write_text("{}\n")
    with pytest.raises(DataError, match=r"found data\.json\nhint: .*empty/\*\.json"):
        PairDataset.from_files(empty, tok)


def test_files_of_two_kinds_are_not_one_data_set(shards, tok):
    (shards / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"one kind, found .*\.jsonl.* and \.parquet\nhint: .*\*\."):
        PairDataset.from_files(shards, tok)


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (("train-00000-of-00002", "test-00000-of-00001"), "test and train"),
        (("train", "dev"), "train and validation"),
        (("pairs_train", "pairs_eval"), "test and train"),
        (("train-eval-0", "train-eval-1"), None),
        (("train-0", "more"), None),
        (("contest", "latest"), None),
    ],
)
def test_files_of_two_splits_are_not_one_data_set(tmp_path, files, splits):
    for name in files:
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    if splits is None:
        assert len(sources(tmp_path).files) == 2
        return
    with pytest.raises(DataError, match=f"expected one split, found files of {splits}\nhint"):
        sources(tmp_path)


def test_a_saved_data_set_is_not_encoded_again(shards, tok, tmp_path):
    pytest.importorskip("pyarrow")
    PairDataset.from_files(shards, tok).save(tmp_path / "saved")
    with pytest.raises(DataError, match=r"hint: PairDataset\.load maps it"):
        PairDataset.from_files(tmp_path / "saved", tok)


def test_a_file_comes_once_from_its_folder_or_its_name(shards):
    with pytest.raises(DataError, match="the same file"):
        sources([shards, shards / "b.jsonl"])


def test_the_error_of_a_bad_row_notes_how_to_skip_it(tok, tmp_path):
    bad = [*ROWS, {**ROWS[0], "chosen": " "}]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", bad)
    calls = [
        lambda **options: PairDataset.from_files(path, tok, **options),
        lambda **options: PairDataset.from_rows(bad, tok, **options),
    ]
    for call in calls:
        with pytest.raises(DataError) as caught:
            call()
        assert caught.value.__notes__ == ['hint: on_bad="skip" drops bad rows and counts them']
        assert "hint" not in str(caught.value)
        assert len(call(on_bad="skip")) == 12


def test_no_such_note_where_skipping_would_not_help(tok, tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(tiny.write_jsonl(tmp_path / "whole.jsonl.gz", ROWS).read_bytes()[:-4])
    with pytest.raises(DataError) as caught:
        PairDataset.from_files(path, tok)
    assert not hasattr(caught.value, "__notes__")
