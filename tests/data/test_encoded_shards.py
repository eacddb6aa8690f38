"""Folders of shards of ids, as `encode_table` jobs write them, mapped."""

import json
import os
import pickle
import subprocess
import sys

import byte_tokenizer
import numpy as np
import pytest
import tiny
from pair_cases import small_pairs
from places import child_path

from dpo_ext import DataError, PairDataset, UnpairedDataset
from dpo_ext.arrow import encode_table

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return byte_tokenizer.tokenizer(tmp_path_factory.mktemp("bytes"))


def marked(n=40):
    return [
        {**row, "score": i / 2, "source": "ab"[i % 2], "hard": i % 3 == 0, "id": i}
        for i, row in enumerate(tiny.rows(n))
    ]


COLUMNS = ("score", "source", "hard", "id")


def put(path, table, kind):
    if kind == "parquet":
        parquet.write_table(table, path.with_suffix(".parquet"), row_group_size=7)
        return
    path = path.with_suffix(".arrow")
    new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=5)


def shards(folder, tables, kind="parquet"):
    folder.mkdir()
    for i, table in enumerate(tables):
        put(folder / f"part-{i:03}", table, kind)
    return folder


def encoded(rows, tokenizer, parts=4, **options):
    step = -(-len(rows) // parts)
    return [
        encode_table(pa.Table.from_pylist(rows[i : i + step]), tokenizer, **options)
        for i in range(0, len(rows), step)
    ]


def same(a, b):
    return (
        all(getattr(a, name) == getattr(b, name) for name in IDS)
        and (a.pad_id, a.vocab_size) == (b.pad_id, b.vocab_size)
        and list(a.columns) == list(b.columns)
        and all(np.array_equal(a.columns[name], b.columns[name]) for name in a.columns)
        and all(getattr(a, n) == getattr(b, n) for n in ("chosen_weights", "rejected_weights"))
        and (a.ref_logps is None) == (b.ref_logps is None)
        and (a.ref_logps is None or np.array_equal(a.ref_logps, b.ref_logps))
    )


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_shards_hold_what_their_rows_give(tmp_path, tokenizer, kind):
    rows = marked()
    expected = PairDataset.from_rows(rows, tokenizer, columns=COLUMNS)
    folder = shards(tmp_path / "in", encoded(rows, tokenizer, columns=COLUMNS), kind)
    pairs = PairDataset.load(folder)
    assert same(pairs, expected)
    assert (pairs.report.read, pairs.report.kept) == (40, 40)
    assert pairs.report.layouts == expected.report.layouts, "as the shards say"
    assert not pairs.prompt_ids.values.flags.writeable, "mapped"
    assert len(pickle.dumps(pairs.chosen_ids)) > 1000
    plan = {"layout": "packed", "tokens_per_batch": 600}
    assert np.array_equal(pairs.plan(**plan)[0].input_ids, expected.plan(**plan)[0].input_ids)


def test_rows_that_were_dropped_are_in_the_report(tmp_path, tokenizer):
    rows = [*tiny.rows(9), {"prompt": "a", "chosen": "b"}, *tiny.rows(4)]
    options = {"on_bad": "skip"}
    pairs = PairDataset.load(shards(tmp_path / "in", encoded(rows, tokenizer, **options)))
    assert (pairs.report.read, pairs.report.kept) == (14, 13)
    assert sum(pairs.report.dropped.values()) == 1
    assert pairs.rows.tolist() == list(range(13))


def test_shards_are_converted_once(tmp_path, tokenizer, monkeypatch):
    folder = shards(tmp_path / "in", encoded(tiny.rows(40), tokenizer))
    first = PairDataset.load(folder, cache_dir=tmp_path / "cache")
    assert sorted(path.name for path in folder.iterdir()) == [
        f"part-{i:03}.parquet" for i in range(4)
    ]
    inside = PairDataset.load(folder)
    assert (folder / ".mapped").is_dir()
    monkeypatch.setattr("dpo_ext.data.shards.Spool", None)
    for again in (PairDataset.load(folder), PairDataset.load(folder, cache_dir=tmp_path / "cache")):
        assert tiny.same_pairs(again, first)
    assert tiny.same_pairs(inside, first)
    renamed = tmp_path / "moved"
    folder.rename(renamed)
    assert tiny.same_pairs(PairDataset.load(renamed), first)


def test_a_shard_that_changed_is_never_stale(tmp_path, tokenizer):
    tables = encoded(tiny.rows(40), tokenizer)
    folder = shards(tmp_path / "in", tables)
    assert len(PairDataset.load(folder)) == 40
    put(folder / "part-001", tables[0], "parquet")
    changed = PairDataset.load(folder)
    assert changed.prompt_ids.tolist()[10:20] == changed.prompt_ids.tolist()[:10]
    (folder / "part-003.parquet").unlink()
    assert len(PairDataset.load(folder)) == 30
    (folder / "part-000.parquet").rename(folder / "part-009.parquet")
    assert PairDataset.load(folder).prompt_ids.tolist() == [
        *changed.prompt_ids.tolist()[10:30],
        *changed.prompt_ids.tolist()[:10],
    ]


def test_a_damaged_conversion_is_made_anew_and_noted(tmp_path, tokenizer):
    folder = shards(tmp_path / "in", encoded(tiny.rows(40), tokenizer))
    whole = PairDataset.load(folder)
    (path,) = (folder / ".mapped").glob("*/*.arrow")
    bad = bytearray(path.read_bytes())
    bad[len(bad) // 2] ^= 1
    path.unlink()  # `whole` has it mapped
    path.write_bytes(bad)
    again = PairDataset.load(folder)
    assert same(again, whole)
    assert any("damaged" in note and "digest" in note for note in again.report.notes)


def test_reference_log_probs_and_weights_come_along(tmp_path, tokenizer):
    rows = [
        {**row, "ref_chosen_logps": -float(i), "ref_rejected_logps": -2.5 * i}
        for i, row in enumerate(tiny.rows(12))
    ]
    pairs = PairDataset.load(shards(tmp_path / "ref", encoded(rows, tokenizer)))
    assert pairs.ref_logps[3].tolist() == [-3.0, -7.5]
    del rows[5]["ref_chosen_logps"], rows[5]["ref_rejected_logps"]
    some = PairDataset.load(shards(tmp_path / "some", encoded(rows, tokenizer)))
    assert some.ref_logps is None
    assert any("9 of 12 pairs" in note for note in some.report.notes)
    weighed = PairDataset.from_ids(
        [[1], [2]], [[3, 4], [5]], [[6], [7]], chosen_weights=[[0.5, 1], [1]]
    )
    halves = [weighed[i : i + 1].to_arrow() for i in range(2)]
    loaded = PairDataset.load(shards(tmp_path / "weights", halves))
    assert loaded.chosen_weights.values.tolist() == [0.5, 1, 1]
    assert loaded.rejected_weights.values.tolist() == [1, 1]


def test_shards_of_other_arrow_types_are_read(tmp_path):
    pairs = small_pairs(30)
    large = pa.table(
        {name: pa.array(getattr(pairs, name).tolist(), pa.large_list(pa.int64())) for name in IDS}
    )
    sliced = pa.concat_tables([large.slice(3, 11), large.slice(20)])
    folder = shards(tmp_path / "in", [large, sliced], "stream")
    loaded = PairDataset.load(folder)
    expected = [*range(30), *range(3, 14), *range(20, 30)]
    for name in IDS:
        assert getattr(loaded, name).tolist() == [
            getattr(pairs, name)[i].tolist() for i in expected
        ]


def test_a_data_set_that_datasets_saved_is_a_folder_of_shards(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    rows = tiny.rows(30)
    data = (
        datasets.Dataset.from_list(rows)
        .with_format("arrow")
        .map(
            lambda table: encode_table(table, tokenizer),
            batched=True,
            batch_size=8,
            remove_columns=list(rows[0]),
        )
    )
    data.save_to_disk(tmp_path / "saved", num_shards=3)
    pairs = PairDataset.load(tmp_path / "saved", tokenizer=tokenizer)
    assert same(pairs, PairDataset.from_rows(rows, tokenizer))
    assert pairs.report.notes == ()


def test_what_stands_beside_shards_is_no_part_of_the_folder(tmp_path, tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")
    pairs = PairDataset.from_rows(tiny.rows(30), tokenizer)
    datasets.Dataset(pairs.to_arrow()).save_to_disk(tmp_path / "saved")
    way = {"cache_dir": tmp_path / "cache"}
    first = PairDataset.from_files(tmp_path / "saved", tokenizer, **way)
    assert same(PairDataset.load(tmp_path / "saved", tokenizer=tokenizer), first)
    assert (tmp_path / "saved" / ".mapped").is_dir()
    monkeypatch.setattr("dpo_ext.data.cache.encode_into", None)
    assert same(PairDataset.from_files(tmp_path / "saved", tokenizer, **way), first)


# Whose ids


def test_who_encoded_is_said_by_the_shards_or_the_caller_or_noted(tmp_path, tokenizer):
    tables = encoded(tiny.rows(8), tokenizer, parts=2)
    plain = [table.replace_schema_metadata(None) for table in tables]
    said = PairDataset.load(shards(tmp_path / "said", tables))
    named = PairDataset.load(shards(tmp_path / "named", plain), tokenizer=tokenizer)
    known = (tokenizer.pad_id, tokenizer.vocab_size)
    assert (said.pad_id, said.vocab_size) == (named.pad_id, named.vocab_size) == known
    assert said.report.notes == named.report.notes == ()
    unsaid = PairDataset.load(tmp_path / "named")
    assert (unsaid.pad_id, unsaid.vocab_size) == (0, None)
    assert any("`tokenizer` says it" in note for note in unsaid.report.notes)


def test_shards_of_two_tokenizers_are_refused(tmp_path, tokenizer):
    tables = encoded(tiny.rows(8), tokenizer, parts=2)
    other = tables[1].replace_schema_metadata(
        {"dpo_ext": json.dumps({"pad_id": 3, "vocab_size": 4000})}
    )
    folder = shards(tmp_path / "two", [tables[0], other])
    with pytest.raises(DataError, match=r"part-001.*expected ids of one tokenizer.*4000.*part-000"):
        PairDataset.load(folder)
    with pytest.raises(DataError, match=r"expected ids of one tokenizer.*`tokenizer`"):
        PairDataset.load(shards(tmp_path / "one", [other]), tokenizer=tokenizer)
    assert not (folder / ".mapped").exists(), "an error comes before work is done"


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"pad_id": -1, "vocab_size": 4}', '{"pad_id": 1}', "7"]
)
def test_metadata_that_lies_is_refused(tmp_path, tokenizer, text):
    (table,) = encoded(tiny.rows(8), tokenizer, parts=1)
    folder = shards(tmp_path / "in", [table.replace_schema_metadata({"dpo_ext": text})])
    with pytest.raises(DataError, match=r"part-000\.parquet: its metadata `dpo_ext`"):
        PairDataset.load(folder)


# Anything else


def test_a_folder_of_anything_else_is_an_error_by_name(tmp_path, tokenizer):
    lines = tmp_path / "lines"
    lines.mkdir()
    tiny.write_jsonl(lines / "a.jsonl", tiny.rows(2))
    with pytest.raises(DataError, match=r"shards of token ids .* found a\.jsonl\n.*from_files"):
        PairDataset.load(lines)
    text = shards(tmp_path / "text", [pa.Table.from_pylist(tiny.rows(2))])
    with pytest.raises(
        DataError, match=r"part-000\.parquet: expected the columns prompt_ids.*found prompt, c"
    ):
        PairDataset.load(text)
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"expected files that end in .*found notes\.txt"):
        PairDataset.load(odd)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError):
        PairDataset.load(tmp_path / "empty")
    single = UnpairedDataset.from_ids([[1]], [[2]], [True]).to_arrow()
    with pytest.raises(DataError, match=r"expected the columns .*found prompt_ids, completion_ids"):
        PairDataset.load(shards(tmp_path / "single", [single]))


def test_a_saved_data_set_without_its_manifest_is_no_shard(tmp_path):
    small_pairs().save(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError):
        PairDataset.load(tmp_path)


def test_a_saved_data_set_is_of_the_tokenizer_and_needs_no_cache(tmp_path, tokenizer):
    small_pairs().save(tmp_path / "other")
    PairDataset.from_rows(tiny.rows(3), tokenizer).save(tmp_path / "saved")
    assert len(PairDataset.load(tmp_path / "saved", tokenizer=tokenizer)) == 3
    with pytest.raises(DataError, match=r"other: expected ids of `tokenizer`.*270.*found.*1000"):
        PairDataset.load(tmp_path / "other", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="`cache_dir` is for a folder of shards"):
        PairDataset.load(tmp_path / "saved", cache_dir=tmp_path / "cache")
    for options in ({"tokenizer": tokenizer}, {"cache_dir": tmp_path / "cache"}):
        with pytest.raises(FileNotFoundError):
            PairDataset.load(tmp_path / "missing", **options)


GOOD = {"prompt_ids": [[1], [2]], "chosen_ids": [[3], [4]], "rejected_ids": [[5], [6, 7]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"chosen_ids": [[3], [-4]]},
            r"row 2, `chosen_ids`: expected token ids in 0\.\.2147483648, found -4",
        ),
        (
            {"chosen_ids": [[3], [2**31]]},
            r"row 2, `chosen_ids`: expected token ids .* found 2147483648",
        ),
        ({"chosen_ids": [[3], None]}, r"row 2, `chosen_ids`: expected a list, found null"),
        ({"chosen_ids": [[3], [4, None]]}, r"row 2, `chosen_ids`: expected numbers, found null"),
        ({"chosen_ids": [["a"], ["b"]]}, r"`chosen_ids`: expected lists of numbers, found list<"),
        ({"chosen_ids": [[0.5], [1.0]]}, r"`chosen_ids`: expected lists of numbers, found list<"),
        ({"chosen_ids": [3, 4]}, r"`chosen_ids`: expected lists of numbers, found int64"),
        (
            {"chosen_weights": [[1.0], [0.5, 2]]},
            r"row 2, `chosen_weights`: expected a weight for each",
        ),
        ({"chosen_weights": [[1.0], [float("nan")]]}, r"row 2, `chosen_weights`: expected finite"),
        ({"score": [1, None]}, r"row 2, `score`: expected a value, found null"),
        (
            {"ref_chosen_logps": [-1.0, -2.0], "ref_rejected_logps": [-1.0, float("inf")]},
            r"row 2, `ref_rejected_logps`: expected finite",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(tmp_path, change, message):
    folder = shards(tmp_path / "in", [pa.table(GOOD), pa.table({**GOOD, **change})])
    if "score" in change:
        put(folder / "part-000", pa.table({**GOOD, "score": [1, 2]}), "parquet")
    with pytest.raises(
        DataError,
        match=r"part-001\.parquet, " + (r"row 1, " if "row" not in message else "") + message,
    ):
        PairDataset.load(folder)
    assert not list((folder / ".mapped").glob("*/*.arrow"))


def test_an_id_outside_the_vocabulary_is_refused_with_its_shard(tmp_path, tokenizer):
    good, bad = pa.table(GOOD), pa.table({**GOOD, "prompt_ids": [[1], [tokenizer.vocab_size]]})
    folder = shards(tmp_path / "in", [good, bad])
    with pytest.raises(DataError, match=r"part-001\.parquet, row 2, `prompt_ids`") as caught:
        PairDataset.load(folder, tokenizer=tokenizer)
    assert (caught.value.line, caught.value.field, caught.value.reason) == (
        2,
        "prompt_ids",
        "bad_ids",
    )


def test_shards_that_differ_in_their_columns_are_refused(tmp_path):
    folder = shards(tmp_path / "in", [pa.table({**GOOD, "id": [1, 2]}), pa.table(GOOD)])
    with pytest.raises(DataError, match=r"part-001.*expected the extra columns \['id'\]"):
        PairDataset.load(folder)


def test_columns_without_a_place_are_noted_and_empty_shards_are_nothing(tmp_path):
    lists = pa.table({**GOOD, "tags": [["a"], ["b"]]})
    folder = shards(tmp_path / "in", [lists, pa.table({}), lists.slice(0, 0)])
    pairs = PairDataset.load(folder)
    assert len(pairs) == 2
    assert any("tags" in note for note in pairs.report.notes)


def test_a_truncated_shard_is_a_bad_input(tmp_path):
    for kind in ("parquet", "file", "stream"):
        folder = shards(tmp_path / kind, [pa.table(GOOD)], kind)
        (path,) = folder.glob("part*")
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(DataError, match="part-000") as caught:
            PairDataset.load(folder)
        assert caught.value.reason == "bad_input"


@pytest.mark.slow
def test_several_processes_convert_once_and_a_killed_one_leaves_nothing(tmp_path, tokenizer):
    folder = shards(tmp_path / "in", encoded(tiny.rows(400), tokenizer, parts=8))
    code = (
        "import os, sys; from dpo_ext import PairDataset; from dpo_ext.data import shards\n"
        "convert, write = shards._convert, shards.write\n"
        "def noted(*given):\n    print('converted'); convert(*given)\n"
        "def killed(*given, **more):\n    os.kill(os.getpid(), 9)\n"
        "shards._convert = noted\n"
        "if sys.argv[2] == 'die': shards.write = killed\n"
        "print(len(PairDataset.load(sys.argv[1])))"
    )

    def start(how):
        return subprocess.Popen(
            [sys.executable, "-c", code, str(folder), how],
            env={**os.environ, "PYTHONPATH": child_path()},
            stdout=subprocess.PIPE,
            text=True,
        )

    dying = start("die")
    dying.communicate()
    assert dying.returncode == -9
    running = [start("live") for _ in range(3)]
    said = [process.communicate()[0].split() for process in running]
    assert sorted(said) == [["400"], ["400"], ["converted", "400"]]
    assert not list((folder / ".mapped").glob("*/.*.tmp")), "swept"


@pytest.mark.slow
def test_a_conversion_needs_little_memory(tmp_path):
    """64 MB of ids in four shards: less than half of it is ever held."""
    n, length = 4000, 1000
    folder = tmp_path / "in"
    folder.mkdir()
    ids = pa.array(np.arange(n * length, dtype=np.int32) % 1000)
    lists = pa.ListArray.from_arrays(np.arange(0, n * length + 1, length, dtype=np.int32), ids)
    empty = pa.array([[]] * n, pa.list_(pa.int32()))
    for i in range(4):
        parquet.write_table(
            pa.table({"prompt_ids": lists, "chosen_ids": empty, "rejected_ids": empty}),
            folder / f"{i}.parquet",
            row_group_size=200,
        )
    code = (
        "import resource, sys, pyarrow.parquet; from dpo_ext import PairDataset\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); pairs = PairDataset.load(sys.argv[1])\n"
        "assert len(pairs) == 16000 and pairs[15999]['prompt_ids'][-1] == 999\n"
        "print(peak() - before)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env={**os.environ, "PYTHONPATH": child_path()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(run.stdout) < 32 << 20, f"{int(run.stdout) >> 20} MB"
