"""Files that are not JSONL: other kinds are named, arrays and tables are read, and what is wrong with them has a place."""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import pickle
import sqlite3
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from byte_tokenizer import decode, tokenizer
from hypothesis import given
from hypothesis import strategies as st

from dpo_ext import DataError, LimitExceeded, Limits, PairDataset
from dpo_ext.data.prepare import prepare

pa = pytest.importorskip("pyarrow")

ROWS = [{"prompt": f"q{i} ", "chosen": f"the {i}", "rejected": f"no é {i}"} for i in range(5)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
ARRAY = json.dumps(ROWS)
HEADER = "prompt,chosen,rejected\n"
CSV = HEADER + "".join(",".join(row.values()) + "\n" for row in ROWS)


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("tokenizer") / "model")


@pytest.fixture
def load(tok, tmp_path):
    """Load bytes or text as a file, with the options of `from_files`."""

    def load(data, name="rows.json", **options):
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return PairDataset.from_files(path, tok, **options)

    return load


def zstd(data):
    return pa.Codec("zstd").compress(data, asbytes=True)


PACKINGS = {"": lambda data: data, ".gz": gzip.compress, ".zst": zstd}


def texts(pairs):
    """Both sides of each pair with their prompt: a token may lie across its end."""
    sides = (pairs.chosen_ids, pairs.rejected_ids)
    return [
        tuple(decode([*prompt, *side[i]]) for side in sides)
        for i, prompt in enumerate(pairs.prompt_ids)
    ]


def want(rows):
    return [
        tuple(row["prompt"] + row[side] + "<|end|>" for side in ("chosen", "rejected"))
        for row in rows
    ]


WANT = want(ROWS)


# -- other kinds --------------------------------------------------------------------------------


def archive(kind):
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("rows.jsonl", JSONL)
    else:
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as file:
            info = tarfile.TarInfo("rows.jsonl")
            info.size = len(JSONL)
            file.addfile(info, io.BytesIO(JSONL.encode()))
    return buffer.getvalue()


def database():
    with sqlite3.connect(":memory:") as connection:
        connection.execute("create table rows (prompt)")
        return connection.serialize()


def array_file():
    buffer = io.BytesIO()
    np.save(buffer, np.arange(9))
    return buffer.getvalue()


def parquet():
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(ROWS), buffer)
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
# name: (content, what the error calls it)
FOREIGN = {
    "UTF-16": (JSONL.encode("utf-16"), "text in UTF-16"),
    "UTF-16 LE": (JSONL.encode("utf-16-le"), "text in UTF-16"),
    "UTF-16 BE": (JSONL.encode("utf-16-be"), "text in UTF-16"),
    "UTF-16 BE with BOM": (b"\xfe\xff" + JSONL.encode("utf-16-be"), "text in UTF-16"),
    "UTF-16 array": (ARRAY.encode("utf-16-le"), "text in UTF-16"),
    "UTF-16 table": (CSV.encode("utf-16"), "text in UTF-16"),
    "UTF-16 table without BOM": (CSV.encode("utf-16-le"), "text in UTF-16"),
    "UTF-32": (JSONL.encode("utf-32"), "text in UTF-32"),
    "UTF-32 LE": (JSONL.encode("utf-32-le"), "text in UTF-32"),
    "UTF-32 BE": (JSONL.encode("utf-32-be"), "text in UTF-32"),
    "xz": (lzma.compress(JSONL.encode()), "an xz file"),
    "lzma": (lzma.compress(JSONL.encode(), format=lzma.FORMAT_ALONE), "an lzma file"),
    "bzip2": (bz2.compress(JSONL.encode()), "a bzip2 file"),
    "bzip2 of nothing": (bz2.compress(b""), "a bzip2 file"),
    "lz4": (pa.Codec("lz4").compress(JSONL.encode(), asbytes=True), "an lz4 file"),
    "snappy": (b"\xff\x06\0\0sNaPpY\x01", "a snappy file"),
    "compress": (b"\x1f\x9d\x90abc", "a file of compress (.Z)"),
    "zip": (archive("zip"), "a zip archive"),
    "empty zip": (b"PK\x05\x06" + bytes(18), "an empty zip archive"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\x04", "a 7z archive"),
    "rar": (b"Rar!\x1a\x07\x01\0", "a rar archive"),
    "tar": (archive(tarfile.USTAR_FORMAT), "a tar archive"),
    "tar of GNU": (archive(tarfile.GNU_FORMAT), "a tar archive"),
    "tar of POSIX": (archive(tarfile.PAX_FORMAT), "a tar archive"),
    "doctype": (b"<!DOCTYPE html>\n<html></html>", "a page in HTML"),
    "doctype in small letters": (b"\xef\xbb\xbf\n <!doctype HTML>", "a page in HTML"),
    "html": (b'<html lang="en"><head><title>404</title>', "a page in HTML"),
    "head": (b"<head><meta/></head><p>Sign in", "a page in HTML"),
    "comment before html": (b"<!-- saved from url -->\n<html>", "a page in HTML"),
    "XHTML": (b'<?xml version="1.0"?>\n<!DOCTYPE html PUBLIC "">', "a page in HTML"),
    "XML": (b'<?xml version="1.0"?><rows><row/></rows>', "XML"),
    "XML error of a bucket": (b"<Error><Code>AccessDenied</Code></Error>", "XML"),
    "pointer": (POINTER, "a pointer of Git LFS"),
    "old pointer": (POINTER.replace(b"git-lfs", b"hawser"), "a pointer of Git LFS"),
    "annex": (b"/annex/objects/SHA256E-s12--4d.jsonl\n", "a pointer of git-annex"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3", "a PDF"),
    "RTF": (b"{\\rtf1\\ansi {", "a text in RTF"),
    "Office": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0", "an old Office file"),
    **{
        f"pickle {n}": (pickle.dumps(ROWS, protocol=n), "a Python pickle")
        for n in range(2, pickle.HIGHEST_PROTOCOL + 1)
    },
    "SQLite": (database(), "an SQLite database"),
    "safetensors": (
        (58).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}    ',
        "a file of tensors",
    ),
    "npy": (array_file(), "a NumPy array"),
    "HDF5": (b"\x89HDF\r\n\x1a\n\0", "an HDF5 file"),
    "Avro": (b"Obj\x01\x04\x14avro.codec", "an Avro file"),
    "GGUF": (b"GGUF\x03\0\0\0\0", "a model in GGUF"),
    "program": (b"\x7fELF\x02\x01", "a program"),
    "PNG": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "an image (PNG)"),
    "JPEG": (b"\xff\xd8\xff\xe0\0\x10JFIF", "an image (JPEG)"),
    "GIF": (b"GIF89a\1\0", "an image (GIF)"),
    "TIFF": (b"II*\0\x08\0\0\0", "an image (TIFF)"),
    "WebP": (b"RIFF\x24\0\0\0WEBPVP8 ", "an image (WebP)"),
    "BMP": (b"BM\x36\0\0\0\0\0\0\0\x36", "an image (BMP)"),
    "WAV": (b"RIFF\x24\0\0\0WAVEfmt ", "a sound (WAV)"),
    "MP4": (b"\0\0\0\x20ftypisom", "a film (MP4)"),
    "zeros": (bytes(5000), "zeros"),
}  # fmt: skip


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_of_another_kind_is_named(load, kind, packing):
    content, what = FOREIGN[kind]
    for on_bad, ending in itertools.product(("error", "skip"), (".jsonl", ".csv", "")):
        with pytest.raises(DataError) as caught:
            load(PACKINGS[packing](content), f"x{ending}{packing}", on_bad=on_bad)
        error = caught.value
        assert (error.reason, error.line) == ("bad_input", None)
        message = str(error).removeprefix(f"{error.path}: expected text, JSON or CSV, found ")
        assert message.startswith(what)
        assert "\nhint: " in message
        assert ("inside gzip" in message) == (packing == ".gz")
        assert ("inside zstd" in message) == (packing == ".zst")


@pytest.mark.parametrize("kind", ["pointer", "doctype", "UTF-16", "zip"])
def test_a_name_does_not_hide_what_a_file_is(load, kind):
    content, what = FOREIGN[kind]
    for name, expected in [
        ("x.parquet", "Parquet"), ("x.arrow", "Arrow"), ("x.feather", "Arrow"),
        ("x.jsonl.gz", "gzip"), ("x.jsonl.zst", "zstd"), ("x.csv.gz", "gzip"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=f"expected {expected}, as the name says, found {what}"):
            load(content, name, on_bad="skip")


@pytest.mark.parametrize(
    ("inside", "what"),
    [(parquet(), "Parquet"), (gzip.compress(JSONL.encode()), "gzip"), (zstd(b"{}"), "zstd")],
    ids=["Parquet", "gzip", "zstd"],
)
def test_what_is_packed_twice_is_named(load, inside, what):
    for packing in (".gz", ".zst"):
        with pytest.raises(DataError, match=f"found {what} inside") as caught:
            load(PACKINGS[packing](inside), "x.jsonl" + packing, on_bad="skip")
        assert caught.value.reason == "bad_input"


@pytest.mark.parametrize(
    "first",
    ["{}", " {}", "\ufeff{}", "\n\n{}", "\t\r\n{}", '{"a": "ustar  \\u0000"}', "1", "nul", '"a"', "-1",
     '{"PK": "<html>"}', "version", "BM,RIFF", "# <html>", "Rar", "BZh9", "x" * 257 + "ustar", "< a", "%PD"],
)  # fmt: skip
def test_lines_are_not_misnamed(load, first):
    pairs = load(first + "\n" + JSONL, on_bad="skip")
    assert texts(pairs) == WANT
    assert sum(pairs.report.dropped.values()) == 1


def test_the_functions_and_the_commands_say_the_same(tok, tmp_path, capsys):
    pytest.importorskip("typer")
    from dpo_ext.bench import bench_data
    from dpo_ext.cli import main
    from dpo_ext.cli.stats import data_stats

    model = str(tmp_path / "model")
    tokenizer(tmp_path / "model")
    path = tmp_path / "rows.jsonl"
    path.write_bytes(POINTER)
    for call in (
        lambda: PairDataset.from_files(path, tok),
        lambda: PairDataset.from_files(path, tok, cache_dir=tmp_path / "cache"),
        lambda: prepare(path, tok, tmp_path / "out"),
        lambda: data_stats(path, tok, show=False),
        lambda: bench_data(path, model, repeats=1, show=False),
    ):
        with pytest.raises(DataError, match="found a pointer of Git LFS\nhint: `git lfs pull`"):
            call()
    assert not (tmp_path / "out" / "manifest.json").exists()
    for command in (["prepare", "--out", str(tmp_path / "out")], ["stats"], ["bench", "data"]):
        with pytest.raises(SystemExit) as stop:
            main([*command, str(path), "--tokenizer", model, "--on-bad", "skip"])
        assert stop.value.code == 2
        assert "hint: `git lfs pull`" in capsys.readouterr().err


# -- one array ----------------------------------------------------------------------------------

ARRAYS = {
    "one line": ARRAY,
    "indented": json.dumps(ROWS, indent=2),
    "one element a line": "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
    "commas first": "[" + "\n,".join(map(json.dumps, ROWS)) + "]",
    "BOM": "\ufeff" + ARRAY,
    "white space": " \t\r\n " + ARRAY + "\r\n\t ",
    "Windows": json.dumps(ROWS, indent=1).replace("\n", "\r\n"),
    "not ASCII": json.dumps(ROWS, ensure_ascii=False),
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("layout", ARRAYS)
def test_an_array_of_rows_is_read(load, layout, packing):
    pairs = load(PACKINGS[packing](ARRAYS[layout].encode()), f"x.json{packing}")
    assert texts(pairs) == WANT
    assert pairs.rows.tolist() == list(range(5))
    report = pairs.report
    assert (report.read, report.kept) == (5, 5)
    assert report.warned == load(JSONL).report.warned


def test_an_array_equals_its_rows_one_a_line(load, tok, tmp_path):
    for name, text in (
        ("a.json", ARRAY),
        ("b.jsonl", JSONL),
        ("c.json", json.dumps(ROWS, indent=4)),
    ):
        (tmp_path / name).write_text(text)
    files = [tmp_path / name for name in ("a.json", "b.jsonl", "c.json")]
    together = PairDataset.from_files(files, tok, threads=1)
    assert texts(together) == WANT * 3
    assert together.rows.tolist() == list(range(15))
    cached = PairDataset.from_files(files, tok, cache_dir=tmp_path / "cache")
    assert texts(cached) == WANT * 3


def test_an_empty_array_is_an_empty_file(load):
    for text in ("[]", "[ ]", "\ufeff [\n\n] \n"):
        assert load(text).report.read == load("").report.read == 0


def element(text, index=2):
    """The array with another element, indented by nothing: element i is in line i + 2."""
    rows = [json.dumps(row) for row in ROWS]
    rows[index] = text
    return "[\n" + ",\n".join(rows) + "\n]"


GOOD = json.dumps(ROWS[2])
# (element, reason, field)
BAD_ELEMENTS = [
    *((text, "not_an_object", None) for text in ("1", '"a"', "null", "true", "[]", "[1, [2]]", f"[{GOOD}]", '"],["')),
    *((text, "bad_json", None) for text in ("nul", "{]", "{", "'a'", "1 2", f"{GOOD} {GOOD}", '{"a": 1,}', "{'a': 1}",
                                            '{"a": 01}', '{"a" 1}', '{"a": "\t"}', '{"a": "\\x"}', "1\x0c", "-", "}",
                                            "[1, 2,]", "// c", '{"a": "\\ud800"}') if text != "{"),
    ('{"chosen": NaN, "rejected": "b"}', "bad_json", "chosen"),
    ('{"a": 1, "a": 2}', "duplicate_key", "a"),
    ("{}", "missing_field", "chosen"),
    ('{"prompt": "a", "chosen": 1, "rejected": "b"}', "wrong_type", "chosen"),
    ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "identical_pair", "rejected"),
    ('{"prompt": "a", "chosen": " ", "rejected": "b"}', "empty_completion", "chosen"),
    ('{"x": ' + "[" * 80 + "]" * 80 + ', "chosen": "a", "rejected": "b"}', "limit", "max_depth"),
    ("{" + ",".join(f'"k{i}": 1' for i in range(1100)) + ', "chosen": "a", "rejected": "b"}', "limit", "max_keys"),
]  # fmt: skip


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("text", "reason", "field"), BAD_ELEMENTS, ids=lambda v: str(v)[:40])
def test_a_bad_element_has_a_line_a_row_and_a_byte(load, text, reason, field, packing):
    whole = element(text)
    data, name = PACKINGS[packing](whole.encode()), f"x.json{packing}"
    with pytest.raises(DataError) as caught:
        load(data, name)
    error = caught.value
    assert (error.reason, error.field, error.line) == (reason, field, 4)
    start = len("".join(whole.splitlines(keepends=True)[:3]).encode())
    assert start <= error.byte <= start + len(text)
    assert str(error).startswith(f"{error.path}, line 4, row 3, byte {error.byte}")
    pairs = load(data, name, on_bad="skip")
    assert texts(pairs) == WANT[:2] + WANT[3:]
    assert pairs.report.dropped == {reason: 1}
    first = pairs.report.first[reason]
    assert (first.path, first.line, first.row, first.field) == (error.path, 4, 3, field)
    assert f"{error.path}, row 3" in str(pairs.report)


def test_an_element_that_is_no_utf8_is_a_bad_row(load):
    pairs = load(
        element('{"chosen": "\xff"}').encode("latin-1").replace(b"\xc3\xa9", b"e"), on_bad="skip"
    )
    assert pairs.report.dropped == {"bad_utf8": 1}


ROW = GOOD
# (text, line and message, or a part of it): wrong as a whole, whatever `on_bad` says
BROKEN = {
    "no bracket": (f"[{ROW}", "line 1, byte 64: expected `]` at the end of the array"),
    "no bracket behind a comma": (f"[{ROW},", "expected `]` at the end of the array"),
    "nothing but a bracket": ("[", "line 1, byte 1: expected `]`"),
    "cut inside an element": (f"[{ROW},\n{{\"a\": 1", "expected `]` at the end of the array"),
    "cut inside a string": (f"[{ROW},\n" + '{"prompt": "a', "at the end of a string in row 2, which begins in line 2"),
    "cut behind a backslash": (f"[{ROW},\n" + '{"prompt": "a\\', "at the end of a string in row 2"),
    "an open object": (element("{"), "expected `]` at the end of the array"),
    "a quote too many": (element(ROW + '"'), "at the end of a string in row 3"),
    "a comma at the end": (f"[{ROW},\n{ROW},\n]", "line 3, byte 131: expected an element of the array behind the comma, found `]`"),
    "a comma at the start": (f"[,{ROW}]", "expected an element of the array or `]`, found `,`"),
    "nothing but a comma": ("[,]", "found `,`"),
    "two commas": (f"[{ROW},,{ROW}]", "behind the comma, found `,`"),
    "a second array": (f"[{ROW}]\n[{ROW}]", "line 2, byte 66: expected the end of the file behind the array, found `[`"),
    "an object behind": (f"[{ROW}]\n{ROW}", "expected the end of the file behind the array, found `{`"),
    "a bracket behind": (f"[{ROW}]]", "behind the array, found `]`"),
    "a comma behind": (f"[{ROW}],", "behind the array, found `,`"),
    "zero bytes behind": (f"[{ROW}]\0", "behind the array, found `\\0`"),
    "not ASCII behind": (f"[{ROW}]é", "behind the array, found `é`"),
    "lines behind an empty one": (f"[]\n{JSONL}", "behind the array, found `{`"),
}  # fmt: skip


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_array_is_a_bad_input(load, kind, packing):
    text, message = BROKEN[kind]
    for on_bad in ("error", "skip"):
        with pytest.raises(DataError) as caught:
            load(PACKINGS[packing](text.encode()), f"x.json{packing}", on_bad=on_bad)
        error = caught.value
        assert error.reason == "bad_input"
        assert error.line is not None
        assert error.byte is not None
        assert str(error).startswith(f"{error.path}, line {error.line}, byte {error.byte}: ")
        assert message in str(error)


def test_every_prefix_of_an_array_is_refused(load):
    for size in range(1, len(ARRAY)):
        with pytest.raises(DataError) as caught:
            load(ARRAY[:size], on_bad="skip")
        assert caught.value.reason == "bad_input"


def test_an_element_over_the_limit_is_dropped_and_the_next_is_read(load):
    long = json.dumps({**ROWS[2], "x": '"],{[' * 300_000})
    for limit in (1000, 100_000, 1_000_000):
        pairs = load(element(long), on_bad="skip", limits=Limits(max_line_bytes=limit))
        assert texts(pairs) == WANT[:2] + WANT[3:]
        first = pairs.report.first["limit"]
        assert (first.line, first.row, first.field) == (4, 3, "max_line_bytes")
        assert first.message == f"the row has more than {limit} bytes"
    with pytest.raises(LimitExceeded):
        load(element(long), limits=Limits(max_line_bytes=1000))
    size = len(json.dumps(ROWS[4]))
    assert len(load(ARRAY, limits=Limits(max_line_bytes=size))) == 5
    with pytest.raises(LimitExceeded):
        load(ARRAY, limits=Limits(max_line_bytes=size - 1))


def test_limits_on_files_hold_for_arrays(load):
    with pytest.raises(LimitExceeded) as caught:
        load(ARRAY, limits=Limits(max_unpacked_bytes=100), on_bad="skip")
    assert caught.value.field == "max_unpacked_bytes"
    bomb = gzip.compress(b"[" + b" " * (80 << 20) + b"]")
    with pytest.raises(LimitExceeded) as caught:
        load(bomb, "x.json.gz", on_bad="skip")
    assert caught.value.field == "max_expansion"


def test_elements_lie_anywhere_in_what_is_read_at_a_time(load):
    """A read is 256 KiB: each byte of an awkward element is once the first of the next one."""
    awkward = {**ROWS[0], "x": ['\\"]', {"a": [1, "é\\\\"]}, "\\"]}
    text = json.dumps(awkward)
    for shift in range(len(text) + 4):
        filler = json.dumps({**ROWS[1], "x": "y" * ((256 << 10) - 120 - shift)})
        pairs = load(f"[{filler} , {text},\n{text}]")
        assert len(pairs) == 3


@pytest.mark.slow
def test_long_arrays_in_members_equal_their_lines(load):
    rng = np.random.default_rng(0)
    rows = [
        {
            "prompt": "é" * int(n % 400),
            "chosen": f'"]}}{i}',
            "rejected": f"\\{i}",
            "x": [[], {"{": "]"}],
        }
        for i, n in enumerate(rng.integers(0, 900, 6000))
    ]
    lines = load("".join(json.dumps(row) + "\n" for row in rows), "x.jsonl")
    assert len(lines) == 6000
    for indent in (None, 1):
        data = json.dumps(rows, indent=indent, ensure_ascii=False).encode()
        cuts = [0, *sorted(rng.integers(0, len(data), 7).tolist()), len(data)]
        members = b"".join(gzip.compress(data[a:b], 1) for a, b in itertools.pairwise(cuts))
        for threads in (1, 2):
            pairs = load(members, "x.json.gz", threads=threads)
            assert pairs.prompt_ids == lines.prompt_ids
            assert pairs.chosen_ids == lines.chosen_ids
            assert pairs.rejected_ids == lines.rejected_ids


ELEMENT = '{"chosen": "a\\" b", "rejected": "c", "x": [1.5, {"y": "]"}]}'
# fmt: off
TOKENS = ["", '"', "{", "}", "[", "]", ",", ":", "\\", "0", "-", "e", " ", "\n", "\t", "NaN", '"a"', "[]", "{}", "é", "\x0c"]
# fmt: on


@given(st.data())
def test_the_array_reader_takes_what_python_takes(tok, tmp_path_factory, data):
    text = f"[{ELEMENT}, {ELEMENT},{ELEMENT}]"
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(1, len(text)))
        end = at + data.draw(st.integers(0, 2))
        text = text[:at] + data.draw(st.sampled_from(TOKENS)) + text[end:]
    path = tmp_path_factory.getbasetemp() / "mutant.json"
    path.write_text(text, encoding="utf-8")
    try:
        rows = json.loads(text)
    except ValueError:
        rows = None
    reason, dropped = None, {}
    try:
        report = PairDataset.from_files(path, tok, on_bad="skip").report
    except DataError as error:
        reason = error.reason
        assert reason in ("bad_input", "no_pairs")
    else:
        dropped = report.dropped
        assert rows is None or report.read == len(rows)
    if rows is None:
        assert reason or dropped.keys() & {"bad_json", "bad_utf8"}
    else:
        assert reason != "bad_input"
        # A number that is none may stand where nobody looks.
        assert "bad_json" not in dropped or "NaN" in text


# -- one object over several lines --------------------------------------------------------------

SPREAD = {
    "rows under a key": (json.dumps({"version": 1, "data": ROWS}, indent=2), "`jq -c '.[\"data\"][]' FILE`"),
    "rows under the first key": ('{"data": [\n' + ",\n".join(map(json.dumps, ROWS)) + "\n]}", '.["data"][]'),
    "one row": (json.dumps(ROWS[0], indent=2), "`jq -c . FILE`"),
    "one row in two lines": ('{"prompt": "a", "chosen": "b",\n "rejected": "c"}', "`jq -c . FILE`"),
    "rows one after the other": ("\n".join(json.dumps(row, indent=1) for row in ROWS), "`jq -c . FILE`"),
    "a conversation": (json.dumps({"prompt": [{"role": "user", "content": "a"}], "chosen": []}, indent=1), "`jq -c . FILE`"),
    "a BOM and white space": ("\ufeff\n \n" + json.dumps(ROWS[0], indent=2), "`jq -c . FILE`"),
    "cut off": (json.dumps({"data": ROWS}, indent=2)[:200], '.["data"][]'),
    "a bracket alone": ("{\n\n  \"a\":\n 1}", "`jq -c . FILE`"),
    "a notebook": (json.dumps({"cells": [{"cell_type": "code"}], "nbformat": 4}, indent=1), '.["cells"][]'),
}  # fmt: skip


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", SPREAD)
def test_an_object_over_several_lines_is_named(load, kind, packing):
    text, hint = SPREAD[kind]
    for on_bad in ("error", "skip"):
        with pytest.raises(DataError) as caught:
            load(PACKINGS[packing](text.encode()), f"x.json{packing}", on_bad=on_bad)
        error = caught.value
        line = 3 if kind.startswith("a BOM") else 1
        assert (error.reason, error.line) == ("bad_input", line)
        assert "found an object over several lines\nhint: " in str(error)
        assert hint in str(error)


@pytest.mark.parametrize(
    "first",
    ["{", '{"prompt": "a", "chosen"', '{"prompt": ', '{"prompt": "a', '{"prompt": "a",', '{"prompt": [', "{}}",
     '{"a": 1} {', '{"a": tru', '{"a": "\\'],
)  # fmt: skip
def test_a_damaged_first_line_is_one_bad_row(load, first):
    pairs = load(f"{first}\n{JSONL}", on_bad="skip")
    assert pairs.report.dropped == {"bad_json": 1}
    assert texts(pairs) == WANT


# -- tables of text -----------------------------------------------------------------------------


def table(rows, delimiter=",", quoting=csv.QUOTE_MINIMAL, end="\n"):
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter, quoting=quoting, lineterminator=end)
    writer.writerow(rows[0])
    writer.writerows(row.values() for row in rows)
    return buffer.getvalue()


NASTY = [
    {"prompt": 'say "hi",\nthen', "chosen": " a;b\tc", "rejected": "NA"},
    {"prompt": "", "chosen": "007", "rejected": "1e5"},
    {"prompt": "null", "chosen": "true", "rejected": "2024-01-01"},
    {"prompt": "é\u2028", "chosen": '"', "rejected": '""'},
    {"prompt": "a\r\nb", "chosen": ",", "rejected": "nan"},
]
NASTY_WANT = want(NASTY)
TABLES = {
    "CSV": ("x.csv", table(NASTY)),
    "CSV of Windows": ("x.CSV", table(NASTY, end="\r\n")),
    "CSV with a BOM": ("x.csv", "\ufeff" + table(NASTY)),
    "all quoted": ("x.csv", table(NASTY, quoting=csv.QUOTE_ALL)),
    "all quoted, with a BOM": ("x.csv", "\ufeff" + table(NASTY, quoting=csv.QUOTE_ALL)),
    "blank lines before": ("x.csv", "\n\r\n" + table(NASTY)),
    "no last line end": ("x.csv", table(NASTY).rstrip("\n")),
    "TSV": ("x.tsv", table(NASTY, "\t")),
    "semicolons": ("x.csv", table(NASTY, ";")),
    "a TSV named CSV": ("x.csv", table(NASTY, "\t")),
    "by its header": ("x.json", table(NASTY)),
    "by a quoted header": ("x", table(NASTY, quoting=csv.QUOTE_ALL)),
    "a TSV by its header": ("x.txt", table(NASTY, "\t")),
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", TABLES)
def test_a_table_of_text_is_read_as_it_is_spelt(load, kind, packing):
    name, text = TABLES[kind]
    pairs = load(PACKINGS[packing](text.encode()), name + packing)
    assert texts(pairs) == NASTY_WANT
    assert pairs.report.read == 5


def test_other_columns_and_other_names(load):
    rows = [
        {"": i, "question": f"q{i}", "win": f" a{i}", "lose": " b", "margin": i / 2, "n": i, "id": f"0{i}"}
        for i in range(4)
    ]  # fmt: skip
    options = {"prompt_key": "question", "chosen_key": "win", "rejected_key": "lose"}
    pairs = load(table(rows), "x.csv", columns=["margin", "n", "id"], **options)
    assert texts(pairs)[1] == ("q1 a1<|end|>", "q1 b<|end|>")
    assert pairs.columns["margin"].dtype == np.float64
    assert pairs.columns["margin"].tolist() == [0.0, 0.5, 1.0, 1.5]
    assert pairs.columns["n"].dtype == np.int64
    assert list(pairs.columns["id"]) == ["00", "01", "02", "03"]


def test_a_column_that_is_a_number_but_for_its_last_row_is_text(load):
    rows = [{**ROWS[0], "x": i, "y": "" if i == 1 else i, "z": 10**19 + i} for i in range(5)]
    rows[-1]["x"] = "n/a"
    pairs = load(table(rows), "x.csv", columns=["x", "z"])
    assert list(pairs.columns["x"]) == ["0", "1", "2", "3", "n/a"]
    assert pairs.columns["z"][0] == str(10**19)
    # An empty field among numbers is none, as null is in JSON.
    pairs = load(table(rows), "x.csv", columns=["y"], on_bad="skip")
    assert (pairs.columns["y"].tolist(), pairs.report.dropped) == ([0, 2, 3, 4], {"wrong_type": 1})


def test_reference_log_probs_are_numbers(load):
    rows = [
        {**row, "ref_chosen_logps": -1.5, "ref_rejected_logps": -i} for i, row in enumerate(ROWS)
    ]
    assert load(table(rows), "x.csv").ref_logps.tolist() == [[-1.5, -i] for i in range(5)]
    for bad, reason in (
        ("x", "wrong_type"),
        ("nan", "wrong_type"),
        ("", "missing_field"),
        ("1e999", "wrong_type"),
    ):
        rows[3]["ref_chosen_logps"] = bad
        pairs = load(table(rows), "x.csv", on_bad="skip")
        assert pairs.report.dropped == {reason: 1}
        assert pairs.report.first[reason].line == 4
        with pytest.raises(DataError) as caught:
            load(table(rows), "x.csv")
        assert (caught.value.line, caught.value.field) == (4, "ref_chosen_logps")
        assert str(caught.value).startswith(f"{caught.value.path}, row 4, `ref_chosen_logps`")


def test_bad_rows_of_a_table_count_behind_the_header(load):
    rows = [*NASTY, {"prompt": "a", "chosen": " ", "rejected": "b"}]
    for name in ("x.csv", "x.json", "x.csv.gz"):
        data = table(rows).encode()
        data = gzip.compress(data) if name.endswith("gz") else data
        with pytest.raises(DataError) as caught:
            load(data, name)
        error = caught.value
        assert (error.reason, error.line, error.field) == ("empty_completion", 6, "chosen")
        assert str(error).startswith(f"{error.path}, row 6, `chosen`")
        pairs = load(data, name, on_bad="skip")
        assert f"{error.path}, row 6" in str(pairs.report)
        assert texts(pairs) == NASTY_WANT


# (content, line, a part of the message)
BAD_TABLES = {
    "too few fields": (CSV + "a,b\n", 6, "expected 3 fields, as in the header, found 2"),
    "too many fields": (CSV + "a,b,c,d\n" + CSV, 6, "expected 3 fields, as in the header, found 4"),
    "too many in the first row": (HEADER + "a,b,c,d\n", 1, "found 4"),
    "an open quote": (CSV + 'a,b,"c\n' + "d,e,f\n", 6, 'expected `"` at the end of the field'),
    "an open quote at the end": (CSV + 'a,b,"c', 6, "found the end of the file"),
    "an open quote in the first field": (CSV + '"a,b,c\n', 6, "found the end of the file"),
    "text behind a quote": (CSV + 'a,"b" c,d\n', 6, "behind the closing quote, found ` `"),
    "a quote that is not doubled": (CSV + 'a,"b "x" c",d\n', 6, "behind the closing quote, found `x`"),
    "a backslash before a quote": (CSV + 'a,"b \\"x\\" c",d\n', 6, "behind the closing quote, found `x`"),
    "Latin-1": (CSV.encode("latin-1"), None, "expected UTF-8, found other bytes"),
    "other columns": ("a,b,c\n1,2,3\n", None, "found 'a', 'b', 'c'\nhint: `prompt_key`"),
    "one of the columns": ("prompt,b,c\n1,2,3\n", None, "found 'prompt', 'b', 'c'"),
    "no header": ("q,a,b\n" * 3, None, "found 'q', 'a', 'b'"),
    "a column twice": ("prompt,chosen,chosen,rejected\na,b,c,d\n", None, "expected one column of this name, found 2"),
    "one column": ("text\nabc\n", None, "found 'text'"),
    "spaces in names": ("prompt, chosen, rejected\na,b,c\n", None, "found 'prompt', ' chosen', ' rejected'"),
    "no table": ("hello\n", None, "found 'hello'"),
}  # fmt: skip


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", BAD_TABLES)
def test_a_bad_table_is_a_bad_input(load, kind, packing):
    content, line, message = BAD_TABLES[kind]
    content = content if isinstance(content, bytes) else content.encode()
    for on_bad in ("error", "skip"):
        with pytest.raises(DataError) as caught:
            load(PACKINGS[packing](content), f"x.csv{packing}", on_bad=on_bad)
        error = caught.value
        assert error.reason == ("duplicate_key" if kind == "a column twice" else "bad_input")
        assert error.line == line
        assert str(error).startswith(error.path + (f", row {line}: " if line else ""))
        assert message in str(error)


def test_a_header_alone_has_no_rows(load):
    for text in (HEADER, HEADER.rstrip(), "\ufeff" + HEADER + "\n\n"):
        assert load(text, "x.csv").report.read == 0


def test_json_under_the_name_of_a_table_is_json(load):
    assert texts(load(JSONL, "x.csv")) == WANT
    assert texts(load(ARRAY, "x.tsv")) == WANT


def test_a_table_lacks_a_column_that_rows_need(load):
    with pytest.raises(DataError) as caught:
        load("prompt,chosen\na,b\n", "x.csv")
    assert (caught.value.reason, caught.value.field) == ("missing_field", "rejected")
    with pytest.raises(DataError) as caught:
        load("prompt,chosen\na,b\n", "x.csv", on_bad="skip")
    assert caught.value.reason == "no_pairs"
    assert "\nmissing_field: expected this field, found none\n" in str(caught.value)


def test_rows_of_a_table_have_a_limit(load):
    text = CSV + "a,b," + "c" * 3000 + "\n"
    for on_bad in ("error", "skip"):
        with pytest.raises(LimitExceeded) as caught:
            load(text, "x.csv", on_bad=on_bad, limits=Limits(max_line_bytes=1000))
        assert (caught.value.field, caught.value.line) == ("max_line_bytes", 6)
        assert str(caught.value).endswith("hint: `limits` sets another limit")
        assert not getattr(caught.value, "__notes__", [])
    assert len(load(text, "x.csv", limits=Limits(max_line_bytes=4000))) == 6
    # What gzip gives at a time is much less than a row.
    long = (
        HEADER + "a,b," + np.random.default_rng(0).bytes(400_000).hex() + "\n" + CSV[len(HEADER) :]
    )
    assert len(load(gzip.compress(long.encode()), "x.csv.gz")) == 6
    bomb = gzip.compress((HEADER + "a,b,c\n" * (14 << 20)).encode())
    with pytest.raises(LimitExceeded) as caught:
        load(bomb, "x.csv.gz", on_bad="skip")
    assert caught.value.field == "max_expansion"
    with pytest.raises(LimitExceeded) as caught:
        load(CSV, "x.csv", limits=Limits(max_unpacked_bytes=20))
    assert caught.value.field == "max_unpacked_bytes"


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_damaged_packed_table_is_raised(load, ending):
    data = PACKINGS[ending](CSV.encode())
    for damaged in (data[: len(data) // 2], data[:-1], data + b"x"):
        with pytest.raises(DataError) as caught:
            load(damaged, "x.csv" + ending, on_bad="skip")
        assert caught.value.reason == "bad_input"


def test_long_tables_equal_their_rows(load, tok, tmp_path):
    rows = [
        {"prompt": 'q"\n' * (i % 50), "chosen": f"a,{i}", "rejected": f"b {i}"} for i in range(9000)
    ]
    want = PairDataset.from_rows(rows, tok)
    path = tmp_path / "long.csv"
    path.write_text(table(rows), encoding="utf-8", newline="")
    for options in ({}, {"cache_dir": tmp_path / "cache"}, {"threads": 1}):
        pairs = PairDataset.from_files(path, tok, **options)
        assert pairs.prompt_ids == want.prompt_ids
        assert pairs.chosen_ids == want.chosen_ids
        assert pairs.rejected_ids == want.rejected_ids


def test_without_pyarrow_the_extra_is_named(load, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("x.csv", "x.json"):
        with pytest.raises(ModuleNotFoundError, match=r"dpo_ext\[arrow\]"):
            load(CSV, name)
    assert texts(load(ARRAY)) == WANT


@given(
    st.lists(
        st.tuples(
            *[st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))] * 3
        ),
        min_size=1,
    )
)
def test_any_table_that_python_writes_is_read_as_python_reads_it(tok, tmp_path_factory, rows):
    rows = [dict(zip(ROWS[0], row, strict=True)) for row in rows]
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_text(table(rows, quoting=csv.QUOTE_ALL), encoding="utf-8", newline="")
    results = []
    for source in (
        lambda: PairDataset.from_files(path, tok, on_bad="skip"),
        lambda: PairDataset.from_rows(rows, tok, on_bad="skip"),
    ):
        try:
            pairs = source()
            results.append((texts(pairs), pairs.report.dropped))
        except DataError as error:
            results.append(error.reason)
    assert results[0] == results[1]


# -- no pair ------------------------------------------------------------------------------------

BAD = [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 3
# (content, name, a part of the guess)
NO_PAIRS = {
    "no rows": ("hello\nworld\n", "x.txt", "rows are JSON objects, one a line or in one array"),
    "CSV of other columns": ("a,b\n1,2\n", "x.txt", "it may be CSV, with the columns 'a', 'b'"),
    "semicolons": ("a;b;c\n1;2;3\n", "x.txt", "it may be CSV, with the columns 'a', 'b', 'c'"),
    "YAML": ("- prompt: a\n  chosen: b\n", "x.yaml", "it may be YAML"),
    "YAML of one row": ("prompt: a\nchosen: b\n", "x.yaml", "it may be YAML"),
    "Markdown": ("# Data\n", "README.md", "rows are JSON objects"),
    "Python": ("{'prompt': 'a'}\n", "x.jsonl", "rows are JSON objects"),
    "Latin-1": ('{"prompt": "\xe9"}\n'.encode("latin-1"), "x.jsonl", "in UTF-8"),
    "other names": ('{"question": "a", "good": "b", "bad": "c"}\n' * 2, "x.jsonl", "give other names"),
    "other names in an array": ('[{"a": "a", "b": "b"}]', "x.json", "give other names"),
    "lists": ('[["a", "b"], ["c", "d"]]', "x.json", "rows are JSON objects"),
    "numbers": ("1\n2\n", "x.jsonl", "rows are JSON objects"),
    "rows under a key": (json.dumps({"data": ROWS}), "x.json", "the rows seem to be the list `data`"),
    "the same side twice": ("".join(json.dumps(row) + "\n" for row in BAD), "x.jsonl", "one and the same field"),
    "the same side twice in an array": (json.dumps(BAD), "x.json", "one and the same field"),
    "the same side twice in a table": (table(BAD), "x.csv", "one and the same field"),
    "no completions": ('{"prompt": "a", "chosen": "", "rejected": " "}\n', "x.jsonl", "under other names"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_PAIRS)
def test_rows_of_which_none_is_kept_are_an_error_with_a_guess(load, tok, tmp_path, kind):
    content, name, guess = NO_PAIRS[kind]
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(DataError) as caught:
            load(content, name, on_bad="skip", cache_dir=cache)
        error = caught.value
        assert (error.reason, error.path) == ("no_pairs", str(tmp_path / name))
        assert f"no row of {error.path} gives a pair\n" in str(error)
        assert "rows read, 0 kept" in str(error)
        assert "\nhint: " in str(error)
        assert guess in str(error)
    report = prepare(tmp_path / name, tok, tmp_path / "out", on_bad="skip")
    assert (report.kept, len(PairDataset.load(tmp_path / "out"))) == (0, 0)


def test_rows_from_memory_of_which_none_is_kept_are_an_error(tok):
    for source in (BAD, iter(BAD), pa.Table.from_pylist(BAD)):
        with pytest.raises(DataError) as caught:
            PairDataset.from_rows(source, tok, on_bad="skip")
        assert (caught.value.reason, caught.value.path) == ("no_pairs", None)
        assert str(caught.value).startswith("no row gives a pair\n3 rows read, 0 kept, 3 dropped")
    with pytest.raises(DataError, match="`max_length` may be too small"):
        PairDataset.from_rows(ROWS, tok, max_length=2, truncation="drop")
    with pytest.raises(DataError) as caught:
        PairDataset.from_arrow(pa.Table.from_pylist(BAD), tok, on_bad="skip")
    assert caught.value.reason == "no_pairs"


def test_no_rows_and_parts_of_a_pipeline_may_be_empty(tok, load):
    from dpo_ext.arrow import encode_table, report_of

    assert len(PairDataset.from_rows([], tok)) == len(load("")) == len(load("\n\n")) == 0
    encoded = encode_table(pa.Table.from_pylist(BAD), tok, on_bad="skip")
    assert encoded.num_rows == 0
    assert report_of(encoded).dropped == {"identical_pair": 3}


# -- numbers that are none ----------------------------------------------------------------------

WORDS = ["NaN", "Infinity", "-Infinity"]


@pytest.mark.parametrize(
    "value", [*WORDS, "[1, NaN]", '{"a": {"b": [-Infinity]}}', '[{"a": NaN, "b": Infinity}]']
)
def test_a_number_that_is_none_is_counted_where_nobody_reads_it(load, value):
    row = json.dumps(ROWS[1])[:-1] + f', "score": {value}, "other": NaN}}'
    assert json.loads(row)["chosen"] == ROWS[1]["chosen"]
    lines = [json.dumps(ROWS[0]), row, row]
    for text in ("\n".join(lines), "[\n" + ",\n".join(lines) + "]"):
        pairs = load(text)
        assert texts(pairs) == [WANT[0], WANT[1], WANT[1]]
        assert pairs.report.warned["non_finite"] == 2
        first = pairs.report.first["non_finite"]
        assert (first.line, first.field) == (3 if text[0] == "[" else 2, "score")
        assert "`score`" in str(pairs.report)


def test_python_writes_what_is_counted(load):
    rows = [
        {**row, "score": value}
        for row, value in zip(
            ROWS, [float("nan"), 1.0, float("inf"), -float("inf"), 2], strict=True
        )
    ]
    assert load("\n".join(map(json.dumps, rows))).report.warned["non_finite"] == 3


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize(
    "field",
    ["prompt", "chosen", "rejected", "ref_chosen_logps", "margin", "tools", "chat_template_kwargs"],
)
def test_a_number_that_is_none_is_a_bad_row_where_it_is_read(load, field, word):
    row = {**ROWS[0], "ref_chosen_logps": -1, "ref_rejected_logps": -1, "margin": 1}
    bad = json.dumps({**row, field: "HERE"}).replace('"HERE"', word)
    inner = json.dumps({**row, field: ["HERE"]}).replace('"HERE"', word)
    for text in (bad, inner):
        with pytest.raises(DataError) as caught:
            load(json.dumps(row) + "\n" + text, columns=["margin"])
        error = caught.value
        assert (error.reason, error.line, error.field) == ("bad_json", 2, field)
        at = text.index(word) + len(json.dumps(row)) + 1
        assert str(error).splitlines()[0] == (
            f"{error.path}, line 2, byte {at}, `{field}`: expected a finite number, found `{word}`"
        )


@pytest.mark.parametrize(
    "value",
    ["-NaN", "nan", "inf", "Inf", "+Infinity", "Infinit", "NaNN", "infinity", "- Infinity", "NaN1"],
)
def test_other_spellings_are_no_json(load, value):
    row = json.dumps(ROWS[1])[:-1] + f', "score": {value}}}'
    with pytest.raises(DataError) as caught:
        load(json.dumps(ROWS[0]) + "\n" + row)
    assert (caught.value.reason, caught.value.line, caught.value.field) == ("bad_json", 2, None)


def test_numbers_that_are_none_pass_in_columns_that_nobody_reads(tok):
    rows = [{**row, "score": float("nan")} for row in ROWS]
    for source in (rows, pa.Table.from_pylist(rows)):
        pairs = PairDataset.from_rows(source, tok)
        assert texts(pairs) == WANT
        assert "non_finite" not in pairs.report.warned
