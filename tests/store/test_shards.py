"""Files that need not fit in memory: encoded in parts, kept in a cache, mapped."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from datetime import datetime
from functools import partial

import numpy as np
import pytest
import tiny
from byte_tokenizer import TEMPLATE, decode, write_folder
from places import child_path

from dpo_ext import DataError, Limits, PairDataset, Tokenizer, _core
from dpo_ext.data import cache as caching
from dpo_ext.data import encode
from dpo_ext.data.options import settings
from dpo_ext.data.prepare import prepare
from dpo_ext.data.spool import Spool
from dpo_ext.store import manifest as manifests
from dpo_ext.store import read as mapped
from dpo_ext.store import write as store
from dpo_ext.store.folder import writing

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

# Pairs of the test of memory; `make deep` and a person at leisure ask for ten million.
MANY = int(os.environ.get("DPO_EXT_PAIRS", "500000"))


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("transformers")
    return Tokenizer.from_pretrained(tiny.tokenizer())


@pytest.fixture(scope="module")
def rows():
    made = tiny.rows(6000)
    made[4100]["chosen"] = ""
    made[5999]["rejected"] = " "
    return made


@pytest.fixture
def files(tmp_path, rows):
    return [
        tiny.write_jsonl(tmp_path / "a.jsonl", rows[:5000]),
        tiny.write_jsonl(tmp_path / "b.jsonl.gz", rows[5000:]),
    ]


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(encode, "parts", partial(encode.parts, pairs=100))


@pytest.fixture
def encoded(monkeypatch):
    """How often files were encoded into the cache."""
    calls = []
    real = caching.encode_into
    monkeypatch.setattr(caching, "encode_into", lambda *a, **k: calls.append(1) or real(*a, **k))
    return calls


def left(folder):
    return sorted(p.name for p in folder.iterdir() if p.name != ".lock")


def options(**changes):
    defaults = {"limits": None, "threads": 1}
    return settings({**defaults, **changes})


def parts(files, tokenizer, pairs, **changes):
    encoder = _core.FileEncoder([str(f) for f in files], tokenizer._core, options(**changes))
    out = []
    while (raw := encoder.next(pairs)) is not None:
        out.append(raw)
    return out


def test_parts_together_are_the_whole(files, tokenizer):
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


# prepare


@pytest.mark.usefixtures("small_parts")
def test_prepare_is_from_files_and_save_byte_for_byte(tmp_path, files, tokenizer):
    whole = PairDataset.from_files(files, tokenizer, on_bad="skip", max_length=60)
    whole.save(tmp_path / "saved")
    seen = []
    report = prepare(
        files,
        tokenizer,
        tmp_path / "prepared",
        on_bad="skip",
        max_length=60,
        progress=lambda *done: seen.append(done),
    )
    assert report == whole.report
    assert left(tmp_path / "prepared") == left(tmp_path / "saved"), "named by their digests"
    loaded = PairDataset.load(tmp_path / "prepared")
    assert tiny.same_pairs(loaded, whole)
    assert seen == sorted(seen)
    for layout in ("padded", "packed"):
        budget = {"layout": layout, "tokens_per_batch": 2048, "seed": 3}
        ours, theirs = loaded.plan(**budget), whole.plan(**budget)
        assert ours.stats == theirs.stats
        assert np.array_equal(ours[5].input_ids, theirs[5].input_ids)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("with_ref", [0, 3000, 5000])
def test_reference_log_probs_are_carried_if_all_pairs_have_them(tmp_path, tokenizer, with_ref):
    rows = tiny.rows(5000)
    for i, row in enumerate(rows[:with_ref]):
        row.update(ref_chosen_logps=-1.0 - i, ref_rejected_logps=-2.0)
    file = tiny.write_jsonl(tmp_path / "a.jsonl", rows)
    whole = PairDataset.from_files(file, tokenizer)
    prepare(file, tokenizer, tmp_path / "out")
    assert tiny.same_pairs(PairDataset.load(tmp_path / "out"), whole)
    assert (whole.ref_logps is None) == (with_ref < 5000)


@pytest.mark.usefixtures("small_parts")
def test_files_of_all_kinds_with_extra_columns_come_out_the_same_three_ways(tmp_path, tokenizer):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = tiny.rows(5000)
    rows[3]["chosen"] = ""
    for i, row in enumerate(rows):
        row.update(weight=i / 2, source=f"s{i % 3}", number=i, hard=i % 2 == 0)
        row.update(ref_chosen_logps=-1.0 * i, ref_rejected_logps=-2.0)
    files = [tmp_path / "a.parquet", tmp_path / "b.jsonl", tmp_path / "c.arrow"]
    pq.write_table(pa.Table.from_pylist(rows[:2000]), files[0])
    tiny.write_jsonl(files[1], rows[2000:4000])
    table = pa.Table.from_pylist(rows[4000:])
    with pa.ipc.new_file(str(files[2]), table.schema) as writer:
        writer.write_table(table)
    options = {"on_bad": "skip", "columns": ["weight", "source", "number", "hard"]}
    whole = PairDataset.from_files(files, tokenizer, **options)
    whole.save(tmp_path / "saved")
    prepare(files, tokenizer, tmp_path / "prepared", **options)
    assert left(tmp_path / "prepared") == left(tmp_path / "saved"), "named by their digests"
    for pairs in (
        PairDataset.load(tmp_path / "saved"),
        PairDataset.load(tmp_path / "prepared"),
        PairDataset.from_files(files, tokenizer, cache_dir=tmp_path / "c", **options),
    ):
        assert tiny.same_pairs(pairs, whole)
        assert list(pairs.columns) == options["columns"]
        for name, values in whole.columns.items():
            assert pairs.columns[name].dtype == values.dtype
            assert np.array_equal(pairs.columns[name], values)


def raw(n, read=None, columns=()):
    empty = (np.empty(0, np.int32), np.zeros(n + 1, np.int64))
    out = {"prompt": empty, "chosen": empty, "rejected": empty, "rows": np.arange(n)}
    out.update(
        weights=None, ref_logps=np.full(2 * n, np.nan), with_ref=0, read=read or n, kept=n, bytes=0
    )
    out.update(
        dropped={"bad_json": read - n} if read else {}, warned={}, first={}, layouts={}, unread=[]
    )
    return {**out, "columns": list(columns)}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([np.array([1, 2]), np.array([3])], [1, 2, 3]),
        ([np.array([1, 2]), np.array([0.5])], [1.0, 2.0, 0.5]),
        ([np.array([0.5]), np.array([7])], [0.5, 7.0]),
        (
            [np.array([2**53 + 1]), np.array([1]), np.array([0.5]), np.array([3])],
            [2.0**53, 1, 0.5, 3],
        ),
        ([np.array([True, False, True]), np.array([False])], [True, False, True, False]),
        ([["a", "", "東京"], ["b"]], ["a", "", "東京", "b"]),
        ([np.array([], np.int64), ["b"]], ["b"]),
        ([], []),
    ],
)
def test_extra_columns_grow_part_by_part(tmp_path, tokenizer, parts, expected):
    with ExitStack() as stack:
        spool = Spool(tmp_path / "spool", ["x"], stack)
        for part in parts:
            spool.append(raw(len(part), columns=[part]), tokenizer.notes)
        with writing(tmp_path / "out") as folder:
            report = spool.report()
            store.write(folder, spool.columns(), pad_id=0, vocab_size=None, report=report)
    manifest = manifests.read_manifest(tmp_path / "out")
    fd = os.open(tmp_path / "out" / manifest["file"]["name"], os.O_RDONLY)
    got = mapped.Mapped(tmp_path / "out", manifest, fd, True).column(manifest["columns"]["x"], "x")
    os.close(fd)
    assert list(got) == expected
    assert {type(value) for value in list(got)} <= {np.int64, np.float64, np.bool_, str}


def test_an_extra_column_of_two_kinds_is_refused(tmp_path, tokenizer):
    with ExitStack() as stack:
        spool = Spool(tmp_path / "spool", ["x"], stack)
        spool.append(raw(1, columns=[np.array([True])]), tokenizer.notes)
        with pytest.raises(DataError, match="`x`"):
            spool.append(raw(1, columns=[["text"]]), tokenizer.notes)


def test_prepare_refuses_what_it_does_not_know(tmp_path, tokenizer):
    file = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.rows(2))
    with pytest.raises(TypeError, match="unknown option `max_lenght`"):
        prepare(file, tokenizer, tmp_path / "out", max_lenght=3)
    with pytest.raises(FileNotFoundError):
        prepare(tmp_path / "b.jsonl", tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("small_parts")
def test_a_bad_row_leaves_what_was_there(tmp_path, files, tokenizer):
    out = tmp_path / "out"
    prepare(files, tokenizer, out, on_bad="skip")
    before = left(out)
    with pytest.raises(DataError) as caught:
        prepare(files, tokenizer, out)
    assert (caught.value.line, caught.value.reason) == (4101, "empty_completion")
    assert left(out) == before


@pytest.mark.slow
@pytest.mark.usefixtures("small_parts")
def test_stopped_at_every_part_the_next_run_gives_the_same_bytes(tmp_path, files, tokenizer):
    """Of an interrupted run nothing is visible, and the next one is complete."""
    prepare(files, tokenizer, tmp_path / "good", on_bad="skip")
    total = len(parts(files, tokenizer, 100, on_bad="skip"))
    out = tmp_path / "out"
    for k in range(total + 1):
        child = os.fork()
        if child == 0:
            try:
                real, done = Spool.append, [0]

                def append(self, *arguments, k=k, real=real, done=done):
                    if done[0] == k:
                        os.kill(os.getpid(), signal.SIGKILL)
                    done[0] += 1
                    real(self, *arguments)

                Spool.append = append
                prepare(files, tokenizer, out, on_bad="skip")
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == (0 if k == total else -signal.SIGKILL)
        if k < total:
            with pytest.raises(FileNotFoundError):
                PairDataset.load(out)
            assert len(left(out)) == 1, "what the last victim left, and nothing of those before"
    assert left(out) == left(tmp_path / "good")


def test_ctrl_c_leaves_nothing(tmp_path, tokenizer):
    rows = tiny.rows(500)
    file = tiny.write_jsonl(tmp_path / "a.jsonl", rows * 200)

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(file, tokenizer, tmp_path / "out", progress=interrupt, threads=1)
    assert not (tmp_path / "out").exists()


PREPARE = """
import re, sys
from pathlib import Path
import tiny
from dpo_ext import Tokenizer, PairDataset
from dpo_ext.data.prepare import prepare
# Not `ru_maxrss`, which a child process has from its parent.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
tokenizer = Tokenizer.from_file(sys.argv[1], eos_id=2, pad_id=0)
report = prepare(sys.argv[2], tokenizer, sys.argv[3])
first = peak()
pairs = PairDataset.load(sys.argv[3])
plan = pairs.plan(layout="packed", tokens_per_batch=16384)
plan[0], plan.stats
print(len(pairs), first, peak())
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_ids(tmp_path, tokenizer):
    """Ten million pairs pass in 2 GB: DPO_EXT_PAIRS=10000000 needs 20 GB of disk and minutes."""
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in tiny.rows(10_000))
    with (tmp_path / "a.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(MANY // 10_000):
            file.write(lines)
    arguments = [tmp_path / "tokenizer.json", tmp_path / "a.jsonl", tmp_path / "out"]
    run = subprocess.run(
        [sys.executable, "-c", PREPARE, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": child_path()},
        capture_output=True,
        text=True,
        check=True,
    )
    pairs, prepared, planned = map(int, run.stdout.split())
    on_disk = sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "a.jsonl").unlink()
    print(
        f"{pairs:,} pairs, {on_disk / 1e6:,.0f} MB on disk: "
        f"peak {prepared / 1e3:,.0f} MB prepared, {planned / 1e3:,.0f} MB planned"
    )
    assert pairs == MANY // 10_000 * 10_000
    # What 10 million pairs may add are 160 bytes each: offsets, lengths and the plan.
    assert planned * 1024 < (300 << 20) + 160 * pairs


# The cache


@pytest.mark.usefixtures("small_parts")
def test_the_second_call_maps_what_the_first_one_made(tmp_path, files, tokenizer, encoded):
    whole = PairDataset.from_files(files, tokenizer, on_bad="skip")
    for k in range(3):
        pairs = PairDataset.from_files(files, tokenizer, on_bad="skip", cache_dir=tmp_path / "c")
        assert tiny.same_pairs(pairs, whole)
        assert not pairs.prompt_ids.values.flags.writeable
        assert encoded == [1], f"call {k}"


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_cache_has_the_permissions_of_the_umask(tmp_path, files, tokenizer, umask):
    for file in files:
        os.utime(file, (1, 1))
    before = os.umask(umask)
    try:
        PairDataset.from_files(files, tokenizer, on_bad="skip", cache_dir=tmp_path / "c")
    finally:
        os.umask(before)
    for path in [tmp_path / "c", *(tmp_path / "c").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def knobs(tmp_path, files, tokenizer):
    """Each of these may change ids: a name and the call."""
    state = tokenizer._state
    other = Tokenizer({**state, "ids": [None, 5, None]})
    template = Tokenizer({**state, "template": tiny.TEMPLATE + " "})
    vocabulary = json.loads(state["json"])
    vocabulary["model"]["merges"] = vocabulary["model"]["merges"][:-1]
    merges = Tokenizer({**state, "json": json.dumps(vocabulary).encode()})
    changed = tmp_path / "changed" / files[0].name
    changed.parent.mkdir()
    changed.write_bytes(files[0].read_bytes().replace(b"Briefly", b"Briefla", 1))
    renamed = shutil.copy(files[0], tmp_path / "changed" / "a.json")
    options = [
        {"max_length": 50},
        {"max_length": None},
        {"truncation": "keep_end"},
        {"truncation": "keep_completions"},
        {"truncation": "drop"},
        {"truncation": "error"},
        {"boundary": "separate"},
        {"boundary": "trl"},
        {"special_tokens_in_text": "text"},
        {"special_tokens_in_text": "error"},
        {"prompt_key": "prompt"},
        {"chosen_key": "rejected", "rejected_key": "chosen"},
        {"on_bad": "error"},
        {"limits": Limits(max_row_tokens=1000)},
        {"limits": Limits(max_line_bytes=1 << 20)},
        {"limits": Limits(max_keys=8)},
    ]
    calls = [(str(option), files[:1], tokenizer, option) for option in options]
    calls += [
        ("EOS", files[:1], other, {}),
        ("template", files[:1], template, {}),
        ("merges", files[:1], merges, {}),
        ("content", [changed], tokenizer, {}),
        ("ending", [renamed], tokenizer, {}),
        ("one more file", files, tokenizer, {}),
        ("order", files[::-1], tokenizer, {}),
    ]
    return calls


@pytest.mark.slow
def test_every_knob_that_may_change_ids_is_a_miss(tmp_path, files, tokenizer, encoded):
    cache = tmp_path / "c"
    base = {"on_bad": "skip", "cache_dir": cache}
    PairDataset.from_files(files[:1], tokenizer, **base)
    calls = knobs(tmp_path, files, tokenizer)
    assert len(calls) >= 20
    for name, paths, tok, option in calls:
        before = len(encoded)
        wanted = {**base, **option}
        try:
            expected = PairDataset.from_files(paths, tok, **{**wanted, "cache_dir": None})
        except (DataError, ValueError) as error:
            with pytest.raises(type(error)):
                PairDataset.from_files(paths, tok, **wanted)
            assert len(encoded) == before + 1, name
            continue
        got = PairDataset.from_files(paths, tok, **wanted)
        assert len(encoded) == before + 1, f"{name} was a hit"
        assert tiny.same_pairs(got, expected), name
        PairDataset.from_files(paths, tok, **wanted)
        assert len(encoded) == before + 1, f"{name} was a miss the second time"


@pytest.mark.parametrize("what", ["package", "format"])
def test_another_version_is_a_miss(tmp_path, files, tokenizer, encoded, monkeypatch, what):
    cache = {"on_bad": "skip", "cache_dir": tmp_path / "c"}
    PairDataset.from_files(files, tokenizer, **cache)
    if what == "package":
        monkeypatch.setattr(_core, "__version__", "99.0")
    else:
        for module in (manifests, store, caching):
            monkeypatch.setattr(module, "VERSION", 99)
    PairDataset.from_files(files, tokenizer, **cache)
    assert len(encoded) == 2


def test_a_file_that_changed_under_the_same_name_size_and_time_is_a_miss(
    tmp_path, files, tokenizer, encoded, monkeypatch
):
    """Also with the digest noted: the time of change of the inode cannot be set."""
    monkeypatch.setattr("dpo_ext.store.notes.RACY_NS", -(10**12))  # note the digest at once
    cache = {"on_bad": "skip", "cache_dir": tmp_path / "c"}
    old = PairDataset.from_files(files[:1], tokenizer, **cache)
    assert list((tmp_path / "c" / ".files").iterdir())
    before = files[0].stat()
    time.sleep(0.02)
    text = files[0].read_bytes()
    files[0].write_bytes(text.replace(b"Briefly", b"Briefla", 1))
    os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert files[0].stat().st_mtime_ns == before.st_mtime_ns
    new = PairDataset.from_files(files[:1], tokenizer, **cache)
    assert len(encoded) == 2
    assert not tiny.same_pairs(old, new)
    assert tiny.same_pairs(new, PairDataset.from_files(files[:1], tokenizer, on_bad="skip"))


def test_what_cannot_change_ids_is_a_hit(tmp_path, files, tokenizer, encoded):
    cache = {"on_bad": "skip", "cache_dir": tmp_path / "c"}
    whole = PairDataset.from_files(files[:1], tokenizer, **cache)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    copied = shutil.copy(files[0], elsewhere / "other name.jsonl")
    os.utime(copied, (1, 1))
    again = Tokenizer.from_pretrained(tiny.tokenizer())
    calls = [
        (files[0], tokenizer, {}),
        (str(files[0]), tokenizer, {}),
        (str(tmp_path / "a*.jsonl"), tokenizer, {}),
        (copied, tokenizer, {}),
        (files[0], again, {}),
        (files[0], tokenizer, {"threads": 1}),
        (files[0], tokenizer, {"threads": 3}),
        (files[0], tokenizer, {"progress": lambda *_: None}),
        (files[0], tokenizer, {"max_length": 1024}),
        (files[0], tokenizer, {"limits": Limits()}),
        (files[0], tokenizer, {"limits": Limits(max_keys=5000, max_line_bytes=1 << 26)}),
    ]
    for paths, tok, option in calls:
        pairs = PairDataset.from_files(paths, tok, **cache, **option)
        assert encoded == [1], str(option)
        assert pairs.prompt_ids == whole.prompt_ids
        # The place of an example has the name that the file has now.
        assert pairs.report.first["empty_completion"].path in (str(files[0]), str(copied))
    pairs = PairDataset.from_files(copied, tokenizer, **cache)
    assert pairs.report.first["empty_completion"].path == str(copied)


def test_limits_that_dropped_a_row_are_part_of_the_key(tmp_path, tokenizer, encoded):
    rows = tiny.rows(50)
    rows[7]["chosen"] = "x" * 5000
    file = tiny.write_jsonl(tmp_path / "a.jsonl", rows)
    base = {"on_bad": "skip", "cache_dir": tmp_path / "c"}
    for limits, kept in ((Limits(max_line_bytes=2000), 49), (Limits(), 50)):
        for _ in range(2):
            pairs = PairDataset.from_files(file, tokenizer, limits=limits, **base)
            assert len(pairs) == kept
    assert len(encoded) == 2


NOW = [2026, 11, 24, 17, 32, 50, 1, 328]


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        ("strftime_now('%d %b %Y')", ["24 Nov 2026"]),
        ('strftime_now("%H:%M") + strftime_now("%Y")', ["17:32", "2026"]),
        ("strftime_now(f)", NOW),
        ("strftime_now('%Y' if x else '%d')", NOW),
        ("strftime_now('%Y') }}{% set f = strftime_now %}{{ f('%d')", NOW),
        ("_dpo_ext_now", NOW),
        ("messages", []),
    ],
)
def test_the_time_counts_as_far_as_the_templates_show_it(call, shown):
    template = "{%- if strftime_now is defined %}{{ " + call + " }}{% endif %}"
    assert caching._now([template], NOW) == shown
    assert caching._now(["{{ messages }}", template], NOW) == shown


@pytest.mark.parametrize("named", ["default", "tool_use"])
@pytest.mark.parametrize("renderer", ["minijinja", "transformers"])
def test_another_date_in_any_named_template_is_a_miss(tmp_path, encoded, named, renderer):
    """The date is the data set's in both renderers, whatever the clock says."""
    loop = TEMPLATE
    if renderer == "transformers":
        pytest.importorskip("transformers")
        loop = "{{ '%s' % 'x' }}" + TEMPLATE
    dated = "{{ strftime_now('%Y-%m-%d') }}" + loop
    templates = {"default": loop, "tool_use": loop, named: dated}
    config = {"chat_template": [{"name": n, "template": t} for n, t in templates.items()]}
    tokenizer = Tokenizer.from_pretrained(
        write_folder(tmp_path / "m", config=config, template=None)
    )
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    row = {name: [{"role": role, "content": name}] for name, role in roles.items()}
    row |= {"tools": [{"name": "f"}]} if named == "tool_use" else {}
    file = tiny.write_jsonl(tmp_path / "a.jsonl", [row])
    for day, misses in ((1, 1), (2, 2), (1, 2)):
        now = datetime(2020, 5, day, 10, day)
        pairs = PairDataset.from_files(file, tokenizer, now=now, cache_dir=tmp_path / "c")
        assert decode(pairs.prompt_ids[0].tolist()).startswith(f"2020-05-0{day}")
        assert len(encoded) == misses


@pytest.mark.parametrize("what", ["flip", "truncate", "manifest", "missing", "junk"])
def test_a_damaged_cache_is_filled_anew_and_says_so(tmp_path, files, tokenizer, encoded, what):
    cache = {"on_bad": "skip", "cache_dir": tmp_path / "c"}
    whole = PairDataset.from_files(files, tokenizer, **cache)
    folder = next(p for p in (tmp_path / "c").iterdir() if p.name != ".files")
    data = next(folder.glob("*.arrow"))
    good = data.read_bytes()
    if what == "flip":
        data.write_bytes(good[:5000] + bytes([good[5000] ^ 4]) + good[5001:])
    elif what == "truncate":
        data.write_bytes(good[:-100])
    elif what == "manifest":
        (folder / "manifest.json").write_bytes(b"{")
    elif what == "missing":
        data.unlink()
    else:
        (folder / f".{os.getpid()}-00000000.tmp").write_bytes(b"junk")
    pairs = PairDataset.from_files(files, tokenizer, **cache)
    assert pairs.prompt_ids == whole.prompt_ids
    assert pairs.rejected_ids == whole.rejected_ids
    assert len(encoded) == (1 if what == "junk" else 2)
    assert any("damaged" in note for note in pairs.report.notes) == (what != "junk")
    again = PairDataset.from_files(files, tokenizer, **cache)
    assert tiny.same_pairs(again, whole)
    assert len(encoded) == (1 if what == "junk" else 2)


CACHED = """
import sys
import tiny
from dpo_ext import PairDataset, Tokenizer
from functools import partial
from dpo_ext.data import cache, encode
encode.parts = partial(encode.parts, pairs=100)
calls = []
real = cache.encode_into
cache.encode_into = lambda *a, **k: calls.append(1) or real(*a, **k)
tokenizer = Tokenizer.from_file(sys.argv[1], eos_id=2, pad_id=0)
print("ready", flush=True)
pairs = PairDataset.from_files(sys.argv[2:-1], tokenizer, on_bad="skip", cache_dir=sys.argv[-1])
print(len(calls), len(pairs), int(pairs.chosen_ids.values.sum()))
"""


@pytest.mark.slow
def test_processes_that_want_the_same_encode_it_once(tmp_path, files, tokenizer):
    """Also after the one that encoded was killed."""
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())

    def start():
        arguments = [tmp_path / "tokenizer.json", *files, tmp_path / "c"]
        return subprocess.Popen(
            [sys.executable, "-c", CACHED, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": child_path(), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )

    rng = random.Random(0)
    for _ in range(3):
        victim = start()
        assert victim.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.005, 0.06))
        victim.kill()
        victim.communicate()
    running = [start() for _ in range(4)]
    results = [run.communicate()[0].split()[1:] for run in running]
    assert [run.returncode for run in running] == [0] * 4
    assert sum(int(calls) for calls, *_ in results) <= 1
    assert len({tuple(rest) for _, *rest in results}) == 1
    assert results[0][1] == "5998"


@pytest.mark.usefixtures("small_parts")
def test_a_file_that_changes_while_it_is_read_is_an_error_and_nothing_is_kept(
    tmp_path, files, tokenizer, monkeypatch
):
    real = Spool.report

    def report(self):
        os.utime(files[1])  # all of it has been read
        return real(self)

    monkeypatch.setattr(Spool, "report", report)
    with pytest.raises(DataError, match=r"b\.jsonl\.gz: the file changed while"):
        PairDataset.from_files(files, tokenizer, on_bad="skip", cache_dir=tmp_path / "c")
    assert not list((tmp_path / "c").glob("*/*.arrow"))


def test_a_pipe_has_no_fingerprint(tmp_path, tokenizer):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="regular file"):
        PairDataset.from_files(tmp_path / "pipe.jsonl", tokenizer, cache_dir=tmp_path / "c")
