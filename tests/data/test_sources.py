"""Parquet, Arrow files, saved data sets, data frames: the same pairs as JSONL, and nothing of a damaged file."""

import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from byte_tokenizer import tokenizer

from dpo_ext import DataError, LimitExceeded, Limits, PairDataset
from dpo_ext.data.progress import is_shown

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = [
    {"prompt": "hello ", "chosen": f"the {i}", "rejected": "a" * (i % 5 + 1), "margin": i / 2}
    for i in range(60)
]
CHAT = [
    {
        "prompt": [{"role": "user", "content": f"hi {i}"}],
        "chosen": [{"role": "assistant", "content": "é" * (i + 1)}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    for i in range(7)
]
TABLE = pa.Table.from_pylist(ROWS)


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("tokenizer") / "model")


def write(path, rows=ROWS, **options):
    """Rows in the format that the name says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path, **{"row_group_size": 25, **options})
    else:
        make = pa.ipc.new_file if path.suffix == ".feather" else pa.ipc.new_stream
        with make(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=25)
    return path


def equal(a, b):
    return (
        a.prompt_ids == b.prompt_ids
        and a.chosen_ids == b.chosen_ids
        and a.rejected_ids == b.rejected_ids
        and a.rows.tolist() == b.rows.tolist()
        and a.report.dropped == b.report.dropped
    )


@pytest.mark.parametrize("rows", [ROWS, CHAT], ids=["text", "chat"])
@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.feather"])
def test_a_file_gives_the_pairs_of_its_rows(tok, tmp_path, name, rows):
    path = write(tmp_path / name, rows)
    want = PairDataset.from_rows(rows, tok)
    assert equal(PairDataset.from_files(path, tok), want)
    # The first bytes count, not the name.
    assert equal(PairDataset.from_files(path.rename(tmp_path / "plain"), tok), want)


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
@pytest.mark.parametrize("use_dictionary", [True, False])
def test_every_parquet_encoding(tok, tmp_path, compression, use_dictionary):
    options = {"compression": compression, "use_dictionary": use_dictionary}
    path = write(tmp_path / "x.parquet", write_page_checksum=True, **options)
    assert equal(PairDataset.from_files(path, tok), PairDataset.from_rows(ROWS, tok))


def test_files_of_several_kinds_are_one_data_set(tok, tmp_path):
    bad = [*ROWS[:30], {**ROWS[0], "chosen": " "}, {**ROWS[0], "rejected": None}]
    files = [
        write(tmp_path / "a.jsonl"),
        write(tmp_path / "b.parquet", bad),
        write(tmp_path / "c.arrow"),
        write(tmp_path / "d.jsonl"),
        write(tmp_path / "e.feather", bad),
    ]
    rows = [*ROWS, *bad, *ROWS, *ROWS, *bad]
    want = PairDataset.from_rows(rows, tok, on_bad="skip", columns=["margin"])
    for cache in (None, tmp_path / "cache"):
        got = PairDataset.from_files(
            files, tok, on_bad="skip", columns=["margin"], cache_dir=cache, threads=1
        )
        assert equal(got, want)
        assert got.columns["margin"].tolist() == want.columns["margin"].tolist()
        first = got.report.first
        assert (first["empty_completion"].path, first["empty_completion"].line) == (
            str(files[1]),
            31,
        )
        assert (first["wrong_type"].line, first["wrong_type"].field) == (32, "rejected")
        assert f"{files[1]}, row 31" in str(got.report)
    with pytest.raises(DataError) as caught:
        PairDataset.from_files(files, tok)
    error = caught.value
    assert (error.path, error.line, error.reason) == (files[1], 31, "empty_completion") or (
        str(error.path) == str(files[1]) and error.line == 31
    )
    assert str(error).startswith(f"{files[1]}, row 31, `chosen`")


def test_columns_that_are_absent_or_null_have_the_reasons_of_the_table(tok, tmp_path):
    path = write(tmp_path / "x.parquet", TABLE.drop_columns(["chosen"]))
    good = write(tmp_path / "good.parquet", ROWS[:1])
    report = PairDataset.from_files([good, path], tok, on_bad="skip").report
    assert (report.read, report.dropped) == (61, {"missing_field": 60})
    path = write(tmp_path / "y.parquet", TABLE.rename_columns(["a", "b", "c", "d"]))
    report = PairDataset.from_files([good, path], tok, on_bad="skip").report
    assert report.dropped == {"missing_field": 60}
    nulls = TABLE.set_column(1, "chosen", pa.nulls(60, pa.string()))
    path = write(tmp_path / "z.parquet", nulls)
    report = PairDataset.from_files([good, path], tok, on_bad="skip").report
    assert report.dropped == {"wrong_type": 60}


# -- data sets and data frames ------------------------------------------------------------------


def test_hugging_face_data_sets(tok, tmp_path):
    datasets = pytest.importorskip("datasets")
    ds = datasets.Dataset.from_list(CHAT * 3)
    for source in (ds, ds.shuffle(seed=1), ds.select([3, 1, 1, 20]), ds.with_format("numpy")):
        want = PairDataset.from_rows(source.with_format(None).to_list(), tok)
        assert equal(PairDataset.from_arrow(source, tok), want)
        assert equal(PairDataset.from_rows(source, tok), want)
    whole = PairDataset.from_rows(ds.to_list(), tok)
    for stream in (
        ds.to_iterable_dataset(),
        datasets.IterableDataset.from_generator(lambda: iter(CHAT * 3)),
    ):
        assert equal(PairDataset.from_arrow(stream, tok), whole)
    changed = ds.with_transform(lambda b: {**b, "rejected": [m[:1] * 2 for m in b["rejected"]]})
    want = PairDataset.from_rows(list(changed), tok)
    assert equal(PairDataset.from_arrow(changed, tok), want)
    assert not equal(want, whole)
    with pytest.raises(TypeError, match="hint: choose a split"):
        PairDataset.from_arrow(datasets.DatasetDict(train=ds), tok)
    shuffled = ds.shuffle(seed=2)
    shuffled.save_to_disk(tmp_path / "saved", num_shards=2)
    got = PairDataset.from_files(tmp_path / "saved", tok)
    assert equal(got, PairDataset.from_rows(shuffled.to_list(), tok))
    datasets.DatasetDict(train=ds).save_to_disk(tmp_path / "dict")
    with pytest.raises(DataError, match="hint: name the folder of a split"):
        PairDataset.from_files(tmp_path / "dict", tok)
    with pytest.raises(DataError, match="expected files that end in"):
        PairDataset.from_files(tmp_path, tok)


@pytest.mark.parametrize(
    "names",
    ["../x.arrow", "/etc/x.arrow", "a/b.arrow", "x.txt", 3, None, "x\0.arrow", "..", "link.arrow"],
    ids=repr,
)
def test_names_in_a_saved_folder_stay_inside(tok, tmp_path, names):
    folder = tmp_path / "saved"
    folder.mkdir()
    write(tmp_path / "x.arrow")
    (folder / "link.arrow").symlink_to(tmp_path / "x.arrow")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": names}]}))
    with pytest.raises(DataError) as caught:
        PairDataset.from_files(folder, tok)
    assert caught.value.reason == "bad_input"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"_data_files": 1}', "[" * 10**5, '{"_data_files": ["a"]}'])  # fmt: skip
def test_a_damaged_state_is_a_bad_input(tok, tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(DataError) as caught:
        PairDataset.from_files(tmp_path, tok, on_bad="skip")
    assert caught.value.reason == "bad_input"


@pytest.mark.parametrize("rows", [ROWS, CHAT], ids=["text", "chat"])
def test_polars(tok, rows):
    polars = pytest.importorskip("polars")
    want = PairDataset.from_rows(rows, tok)
    frame = polars.DataFrame(rows)
    assert equal(PairDataset.from_arrow(frame, tok), want)
    assert equal(
        PairDataset.from_arrow(polars.concat([frame[:3], frame[3:]], rechunk=False), tok), want
    )


@pytest.mark.parametrize("rows", [ROWS, CHAT], ids=["text", "chat"])
def test_pandas(tok, rows):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(rows)
    want = PairDataset.from_rows(rows[3:], tok)
    assert equal(PairDataset.from_arrow(frame[3:], tok), want)
    assert equal(PairDataset.from_rows(frame[3:], tok), want)


# -- damage -------------------------------------------------------------------------------------

# Each damaged file in one child with little memory: typed errors or the very same pairs, no signal.
CHILD = """
import faulthandler, os, resource, sys
import numpy as np
import pyarrow, pyarrow.parquet
import dpo_ext
from dpo_ext import PairDataset
faulthandler.enable()
pyarrow.set_cpu_count(1); pyarrow.set_io_thread_count(1)
t = dpo_ext.Tokenizer.from_pretrained(sys.argv[1])
path, mode = sys.argv[2], sys.argv[3]
good = open(path, "rb").read()
want = PairDataset.from_files(path, t, threads=1)
limit = 2 << 30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
counts = {"same": 0, "other": 0, "bad_input": 0, "row": 0, "memory": 0}
rng = np.random.default_rng(0)
def cases():
    if mode == "cut":
        for size in sorted({int(n) for n in np.linspace(4, len(good) - 1, 150)}):
            yield good[:size]
    elif mode == "flip":
        for _ in range(300):
            spoiled = bytearray(good)
            spoiled[int(rng.integers(4, len(good)))] ^= 1 << int(rng.integers(8))
            yield bytes(spoiled)
    else:
        for _ in range(150):
            spoiled = bytearray(good)
            at = int(rng.integers(4, len(good) - 8))
            spoiled[at:at + 4] = [b"\\xff" * 4, b"\\0" * 4, b"\\xff\\xff\\xff\\x7f"][int(rng.integers(3))]
            yield bytes(spoiled)
for data in cases():
    with open(path, "wb") as file:
        file.write(data)
    try:
        got = PairDataset.from_files(path, t, on_bad="skip", threads=1)
    except dpo_ext.DataError as error:
        counts["bad_input" if error.reason in ("bad_input", "limit", "duplicate_key", "no_pairs") else "row"] += 1
    except MemoryError:
        counts["memory"] += 1
    else:
        same = got.chosen_ids == want.chosen_ids and got.rejected_ids == want.rejected_ids
        counts["same" if same and got.prompt_ids == want.prompt_ids else "other"] += 1
print(counts)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cut", "flip", "splat"])
@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.feather"])
def test_damaged_files_are_typed_errors(tmp_path, name, mode):
    tokenizer(tmp_path / "m")
    options = {"write_page_checksum": True} if name == "x.parquet" else {}
    path = write(tmp_path / name, **options)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, tmp_path / "m", path, mode],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "OPENBLAS_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout.replace("'", '"'))
    assert counts["row"] == 0
    assert counts["bad_input"] > 20
    if mode == "cut" and name != "x.arrow":
        assert counts["other"] == counts["same"] == 0
    if name == "x.parquet" and mode == "flip":
        # The pages have checksums; the footer has none.
        assert counts["other"] < 40


def test_a_page_checksum_that_does_not_match_is_raised(tok, tmp_path):
    path = write(tmp_path / "x.parquet", write_page_checksum=True, compression="none", use_dictionary=False)  # fmt: skip
    data = path.read_bytes()
    at = data.index(b"the 17") + 4
    path.write_bytes(data[:at] + b"2" + data[at + 1 :])
    for on_bad in ("error", "skip"):
        with pytest.raises(DataError) as caught:
            PairDataset.from_files(path, tok, on_bad=on_bad)
        assert (caught.value.reason, str(caught.value.path)) == ("bad_input", str(path))


@pytest.mark.parametrize(
    "data", [b"", b"PAR1", b"PAR1PAR1", b"ARROW1", b"\xff\xff\xff\xff", b"{}\n"]
)
@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.feather"])
def test_files_that_are_not_what_they_say(tok, tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        PairDataset.from_files(tmp_path / name, tok, on_bad="skip")
    assert caught.value.reason == "bad_input"


def test_a_dictionary_bomb_is_a_limit(tok, tmp_path):
    text = pa.DictionaryArray.from_arrays(np.zeros(20_000, np.int32), pa.array(["x" * 50_000]))
    table = pa.table({"chosen": text, "rejected": ["b"] * 20_000, "prompt": ["a"] * 20_000})
    for stored in (True, False):
        path = write(tmp_path / "x.parquet", table, row_group_size=20_000, store_schema=stored)
        assert path.stat().st_size < 200_000
        a_bomb(tok, path)


def a_bomb(tok, path):
    with pytest.raises(LimitExceeded) as caught:
        PairDataset.from_files(
            path, tok, on_bad="skip", max_length=4, threads=1, limits=Limits(max_row_tokens=99)
        )
    assert caught.value.field == "max_expansion"


def test_a_file_that_changes_while_it_is_read_is_refused(tok, tmp_path):
    path = write(tmp_path / "x.parquet", ROWS * 400)

    def grow(done, rows):
        with path.open("ab") as file:
            file.write(b"x")

    with pytest.raises(DataError) as caught:
        PairDataset.from_files(path, tok, progress=grow, threads=1)
    assert caught.value.reason == "bad_input"


# -- extra columns and progress -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1, -2, 2**62], np.int64),
        ([1, 2.5, -1], np.float64),
        ([True, False, True], np.bool_),
        (["a", "é", ""], np.object_),
    ],
    ids=str,
)
def test_extra_columns_stay_with_their_pairs(tok, tmp_path, values, dtype):
    rows = [{**ROWS[i], "x": v} for i, v in enumerate(values)]
    rows.insert(1, {**ROWS[0], "chosen": "", "x": values[0]})
    path = tmp_path / "x.jsonl"
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    for pairs in (
        PairDataset.from_rows(rows, tok, columns=["x"], on_bad="skip"),
        PairDataset.from_files(path, tok, columns=["x"], on_bad="skip"),
        PairDataset.from_arrow(pa.Table.from_pylist(rows), tok, columns=("x",), on_bad="skip"),
    ):
        assert pairs.columns["x"].dtype == dtype
        assert pairs.columns["x"].tolist() == values
        assert pairs[2]["x"] == values[2]
        assert pairs.with_ref_logps(np.zeros((3, 2))).columns["x"].tolist() == values


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_every_batch_has_the_columns_of_its_pairs(tok, layout):
    torch = pytest.importorskip("torch")
    rows = [{**row, "name": f"n{i}", "flag": i % 3 == 0} for i, row in enumerate(ROWS)]
    pairs = PairDataset.from_rows(rows, tok, columns=["margin", "name", "flag"])
    seen = 0
    for batch in pairs.plan(layout=layout, tokens_per_batch=600, seed=3):
        index = batch.pair_index.tolist()
        for part, kind in ((batch, np.ndarray), (batch.to("cpu"), torch.Tensor)):
            assert isinstance(part.columns["margin"], kind)
            assert part.columns["margin"].tolist() == [rows[i]["margin"] for i in index]
            assert part.columns["flag"].tolist() == [rows[i]["flag"] for i in index]
            assert part.columns["name"] == [rows[i]["name"] for i in index]
        seen += len(index)
    assert seen == len(rows)
    plain = PairDataset.from_rows(rows, tok).plan(layout=layout, tokens_per_batch=600)
    assert plain[0].columns == plain[0].to("cpu").columns == {}


def test_saved_columns_come_back(tok, tmp_path):
    rows = [{**row, "name": f"n{i}", "flag": i % 3 == 0, "n": i} for i, row in enumerate(ROWS)]
    names = ["margin", "name", "flag", "n"]
    pairs = PairDataset.from_rows(rows, tok, columns=names)
    pairs.save(tmp_path / "saved")
    loaded = PairDataset.load(tmp_path / "saved")
    for name in names:
        assert loaded.columns[name].tolist() == pairs.columns[name].tolist()
        assert loaded.columns[name].dtype == pairs.columns[name].dtype


BAD = [
    ({}, "missing_field"),
    ({"x": None}, "wrong_type"),
    ({"x": [1]}, "wrong_type"),
    ({"x": {}}, "wrong_type"),
    ({"x": "1"}, "wrong_type"),
    ({"x": True}, "wrong_type"),
    ({"x": 2**64}, "wrong_type"),
]


@pytest.mark.parametrize(("fields", "reason"), BAD, ids=str)
@pytest.mark.parametrize("at", [1, 3000])
def test_a_bad_extra_value_is_a_bad_row(tok, tmp_path, fields, reason, at):
    rows = [{**ROWS[0], "x": 1} for _ in range(4000)]
    rows[at] = {**ROWS[0], "margin": 1, **fields} if fields else dict(ROWS[0])
    path = tmp_path / "x.jsonl"
    write(path, rows)
    for make in (PairDataset.from_rows, PairDataset.from_files):
        source = rows if make == PairDataset.from_rows else path
        with pytest.raises(DataError) as caught:
            make(source, tok, columns=["x"])
        error = caught.value
        assert (error.reason, error.field, error.line) == (reason, "x", at + 1)
        kept = make(source, tok, columns=["x"], on_bad="skip", threads=2)
        assert kept.report.dropped == {reason: 1}
        assert kept.columns["x"].tolist() == [1] * 3999


def test_the_first_pair_says_what_a_column_holds_whatever_the_threads(tok):
    rows = [{**ROWS[0], "x": 1} for _ in range(2000)]
    rows[0] = {**ROWS[0], "chosen": " ", "x": "a"}  # no pair, so it says nothing
    rows[300:700] = [{**ROWS[0], "x": "b"} for _ in range(400)]
    for threads in (1, 2, 8):
        pairs = PairDataset.from_rows(rows, tok, columns=["x"], on_bad="skip", threads=threads)
        assert pairs.report.dropped == {"empty_completion": 1, "wrong_type": 400}
        assert pairs.rows[298:300].tolist() == [299, 700]


@pytest.mark.parametrize(
    ("columns", "error"),
    [("x", TypeError), ([3], TypeError), (["x", "x"], ValueError), (["chosen"], ValueError), (["tools"], ValueError)],
    ids=str,
)  # fmt: skip
def test_bad_names_of_columns_are_refused(tok, columns, error):
    with pytest.raises(error, match="`columns`"):
        PairDataset.from_rows(ROWS, tok, columns=columns)


def test_only_the_first_rank_shows_progress():
    shown = [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),
    ]
    for variables, expected in [*shown, ({"LOCAL_RANK": "1"}, False), ({"LOCAL_RANK": "0"}, True)]:
        assert is_shown(variables) is expected


def test_a_short_run_writes_nothing_where_there_is_no_terminal(tok, tmp_path, capfd, monkeypatch):
    path = write(tmp_path / "x.parquet")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        PairDataset.from_files(path, tok, progress=True)
        PairDataset.from_arrow(TABLE, tok, progress=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.feather"])
def test_progress_ends_at_the_size_of_the_files(tok, tmp_path, name):
    path = write(tmp_path / name, ROWS * 2000)
    seen = []
    PairDataset.from_files(path, tok, progress=lambda *done: seen.append(done), threads=1)
    assert seen
    assert seen == sorted(seen)
    assert all(done <= path.stat().st_size for done, _ in seen)
