"""Saved data sets: what comes back, what is refused, and what a crash leaves behind."""

import contextlib
import errno
import fcntl
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from disk_calls import in_child, stop_at
from pair_cases import small_pairs
from places import GOLDEN as GOLDEN_FILES
from places import child_path
from saved_folders import data_file, flips_seen, forge

from dpo_ext import DataError, PairDataset, Ragged
from dpo_ext.store import folder
from dpo_ext.store import manifest as manifests
from dpo_ext.store import read as mapped

pa = pytest.importorskip("pyarrow")
hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, pytest.importorskip("hypothesis.strategies")

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

GOLDEN = GOLDEN_FILES / "pairs-v1"


ids = st.lists(st.integers(0, 2**31 - 1), max_size=4)


@given(rows=st.lists(st.tuples(ids, ids, ids), max_size=6), ref=st.booleans(), drops=st.booleans())
def test_what_is_saved_comes_back(rows, ref, drops):
    pairs = PairDataset.from_ids(*([row[i] for row in rows] for i in range(3)), pad_id=7)
    if ref:
        pairs = pairs.with_ref_logps(np.arange(2.0 * len(rows)).reshape(-1, 2) / 3)
    if drops:
        pairs.rows = np.arange(len(rows)) * 2 + 1
    with tempfile.TemporaryDirectory() as name:
        pairs.save(Path(name) / "saved")
        assert tiny.same_pairs(PairDataset.load(Path(name) / "saved"), pairs)
        assert tiny.same_pairs(PairDataset.load(Path(name) / "saved", verify=False), pairs)


def test_anything_that_reads_arrow_reads_it(tmp_path):
    pairs = small_pairs().with_ref_logps(np.full((20, 2), -1.5))
    pairs.save(tmp_path)
    table = pa.ipc.open_file(str(data_file(tmp_path))).read_all()
    table.validate(full=True)
    assert table.column_names == [
        "prompt_ids",
        "chosen_ids",
        "rejected_ids",
        "ref_chosen_logps",
        "ref_rejected_logps",
    ]
    assert table.schema.field("prompt_ids").type == pa.list_(pa.int32())
    for name in table.column_names[:3]:
        assert table[name].to_pylist() == getattr(pairs, name).tolist()
    assert set(table["ref_chosen_logps"].to_pylist()) == {-1.5}


def test_hugging_face_reads_it(tmp_path):
    datasets = pytest.importorskip("datasets")
    pairs = small_pairs()
    pairs.save(tmp_path / "saved")
    loaded = datasets.load_dataset(
        "arrow",
        data_files=str(data_file(tmp_path / "saved")),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert loaded[3]["chosen_ids"] == pairs[3]["chosen_ids"].tolist()
    assert loaded.column_names == ["prompt_ids", "chosen_ids", "rejected_ids"]


@pytest.mark.slow
def test_ids_are_views_of_the_file(tmp_path):
    n, length = 1000, 8000
    values = np.arange(n * length, dtype=np.int32) % 1000
    long = Ragged(values, np.arange(n + 1) * length)
    empty = Ragged(np.empty(0, np.int32), np.zeros(n + 1, np.int64))
    PairDataset.from_ids(long, empty, empty, vocab_size=1000).save(tmp_path)
    code = (
        "import sys; from dpo_ext import PairDataset, store\n"
        "rss = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        f"before = rss(); pairs = PairDataset.load({str(tmp_path)!r}, verify=sys.argv[1] == 'True')\n"
        "grown = rss() - before\n"
        "assert not pairs.prompt_ids.values.flags.writeable\n"
        "assert pairs[999]['prompt_ids'][-1] == 999\n"
        "assert 'pyarrow' not in sys.modules\n"
        "print(grown)"
    )
    for verify in ("True", "False"):
        run = subprocess.run(
            [sys.executable, "-c", code, verify], capture_output=True, text=True, check=True
        )
        assert int(run.stdout) < 16 << 20, f"of {values.nbytes} bytes on disk"


def test_offsets_grow_to_64_bits_where_32_do_not_reach(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_ext.store.columns.MAX_INT32", 50)
    pairs = small_pairs()
    pairs.save(tmp_path)
    table = pa.ipc.open_file(str(data_file(tmp_path))).read_all()
    assert table.schema.field("prompt_ids").type == pa.large_list(pa.int32())
    assert tiny.same_pairs(PairDataset.load(tmp_path), pairs)


def test_extra_columns_come_back(tmp_path):
    from dpo_ext.store.columns import Columns
    from dpo_ext.store.write import write

    columns = Columns.of(small_pairs(9))
    columns.add("weight", [0.5] * 9)
    columns.add("id", np.arange(9))
    columns.add("hard", [True, False, True] * 3)
    columns.add("source", ["a", "", "東京"] * 3)
    for name in ("chosen_ids", "row"):
        with pytest.raises(DataError, match=f"`{name}`"):
            columns.add(name, [1] * 9)
    with pytest.raises(TypeError, match="`odd`"):
        columns.add("odd", [[1, 2]] * 9)
    with folder.writing(tmp_path) as opened:
        write(opened, columns, pad_id=0, vocab_size=None, report=small_pairs(9).report)
    table = pa.ipc.open_file(str(data_file(tmp_path))).read_all()
    manifest = manifests.read_manifest(tmp_path)
    with data_file(tmp_path).open("rb") as file:
        reader = mapped.Mapped(tmp_path, manifest, file.fileno(), True)
    for name in ("weight", "id", "hard", "source"):
        column = reader.column(manifest["columns"][name], name)
        assert list(column) == table[name].to_pylist()


# Damage


def loads_or_refuses(path, pairs, verify=True):
    """True if it was refused; what loads must be right."""
    try:
        loaded = PairDataset.load(path, verify=verify)
    except DataError:
        return True
    assert not verify or tiny.same_pairs(loaded, pairs)
    for plan in (
        loaded.plan(layout="padded", pairs_per_batch=4),
        loaded.plan(layout="packed", tokens_per_batch=4096),
    ):
        list(plan)
    return False


@pytest.mark.slow
def test_every_flipped_byte_is_seen(tmp_path):
    pairs = small_pairs(30)
    pairs.save(tmp_path)
    rng = random.Random(1)
    seen = flips_seen(
        data_file(tmp_path), lambda at: rng.randrange(8), lambda: loads_or_refuses(tmp_path, pairs)
    )
    assert all(seen)
    assert not loads_or_refuses(tmp_path, pairs)


@pytest.mark.slow
def test_every_flipped_byte_of_the_manifest_is_seen_or_changes_nothing(tmp_path):
    pairs = small_pairs(5)
    pairs.save(tmp_path)
    seen = flips_seen(
        tmp_path / "manifest.json", lambda at: at % 7, lambda: loads_or_refuses(tmp_path, pairs)
    )
    assert sum(seen) > 0.6 * len(seen), "what is left is white space"


@pytest.mark.slow
def test_every_truncation_and_every_wrong_tail_is_seen(tmp_path):
    pairs = small_pairs(10)
    pairs.save(tmp_path)
    path = data_file(tmp_path)
    good = path.read_bytes()
    others = [good[:n] for n in range(len(good))]
    others += [good + b"\0", good + good, good[:-8] + bytes(8), bytes(len(good))]
    for bad in others:
        path.write_bytes(bad)
        assert loads_or_refuses(tmp_path, pairs)
        assert loads_or_refuses(tmp_path, pairs, verify=False) or len(bad) == len(good)
    manifest = (tmp_path / "manifest.json").read_bytes()
    for n in range(len(manifest) - 1):
        (tmp_path / "manifest.json").write_bytes(manifest[:n])
        assert loads_or_refuses(tmp_path, pairs)


def test_files_of_two_data_sets_swapped_are_seen(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        small_pairs(20, seed).save(tmp_path / name)
    a, b = data_file(tmp_path / "a"), data_file(tmp_path / "b")
    b.rename(tmp_path / "a" / a.name)
    with pytest.raises(DataError, match=r"digest|bytes"):
        PairDataset.load(tmp_path / "a")
    with pytest.raises(DataError, match="missing"):
        PairDataset.load(tmp_path / "b")


@pytest.mark.slow
def test_without_verification_a_flip_never_reads_out_of_bounds(tmp_path):
    pairs = small_pairs(30)
    pairs.save(tmp_path)
    path = data_file(tmp_path)
    good = path.read_bytes()
    for at in range(0, len(good), 3):
        bad = bytearray(good)
        bad[at] ^= 0x80
        path.write_bytes(bad)
        with contextlib.suppress(DataError):
            loads_or_refuses(tmp_path, pairs, verify=False)


def test_an_id_outside_the_vocabulary_is_refused_whatever_the_digest_says(tmp_path):
    small_pairs().save(tmp_path)
    forge(tmp_path, lambda m: m.update(vocab_size=10))
    with pytest.raises(DataError, match=r"`prompt_ids`: expected token ids in 0\.\.10") as caught:
        PairDataset.load(tmp_path)
    assert caught.value.reason == "bad_ids"
    first = next(i for i, row in enumerate(small_pairs().prompt_ids) if (row >= 10).any())
    assert caught.value.line == first + 1


# Hostile manifests, checksum and all


names = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["", ".", "..", "../x.arrow", "/etc/passwd", "a/b.arrow", "manifest.json"]),
    st.sampled_from(["0" * 32 + ".arrow\n", "0" * 31 + "/.arrow", "A" * 32 + ".arrow"]),
    st.one_of(st.none(), st.integers(), st.lists(st.text()), st.binary().map(repr)),
)


@given(name=names)
def test_no_name_but_a_digest_is_ever_opened(name):
    with tempfile.TemporaryDirectory() as path:
        path = Path(path) / "saved"
        small_pairs(2).save(path)
        opened = []
        forge(path, lambda m: m["file"].update(name=name))
        real = os.open

        def spy(target, *args, **kwargs):
            opened.append(Path(target))
            return real(target, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "open", spy)
            with pytest.raises(DataError, match="`file`"):
                PairDataset.load(path)
        assert opened == [path / "manifest.json"]


numbers = st.one_of(
    st.sampled_from([-1, 0, 1, 2, 3, 2**31, 2**32, 2**62, 2**63, 2**64, 2**70]),
    st.integers(-5, 5000),
    st.sampled_from([None, True, 1.5, "8", [], {}, [8], [[8, 8]]]),
)


@given(
    where=st.sampled_from(
        [
            "n",
            "pad_id",
            "vocab_size",
            "kind",
            "start",
            "size",
            "buffers",
            "columns",
            "report",
            "bytes",
        ]
    ),
    column=st.sampled_from(["prompt_ids", "rejected_ids", "ref_chosen_logps"]),
    which=st.integers(0, 1),
    value=numbers,
)
def test_numbers_of_a_hostile_manifest_are_checked(where, column, which, value):
    """A lie is refused before anything is allocated for it, and nothing outside is read."""
    with tempfile.TemporaryDirectory() as path:
        path = Path(path)
        pairs = small_pairs(6).with_ref_logps(np.zeros((6, 2)))
        pairs.save(path / "saved")

        def change(manifest):
            if where in ("n", "pad_id", "vocab_size", "columns", "report"):
                manifest[where] = value
            elif where == "bytes":
                manifest["file"]["bytes"] = value
            elif where in ("kind", "buffers"):
                manifest["columns"][column][where] = value
            else:
                place = manifest["columns"][column]["buffers"][
                    which % 1 if "logps" in column else which
                ]
                place[where == "size"] = value

        forge(path / "saved", change)
        with contextlib.suppress(DataError):
            for pairs in (
                PairDataset.load(path / "saved"),
                PairDataset.load(path / "saved", verify=False),
            ):
                assert len(pairs) <= 6
                for plan in (
                    pairs.plan(layout="padded", pairs_per_batch=2),
                    pairs.plan(layout="packed", tokens_per_batch=4096),
                ):
                    list(plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2, package="9.9"), r"expected version 1 .* found 2, .*9\.9"),
        (lambda m: m.update(version=0), "expected version 1"),
        (lambda m: m.update(version=True), "expected version 1"),
        (lambda m: m.update(format="other"), "expected the format"),
        (lambda m: m.update(n=7), "`prompt_ids`"),
        (lambda m: m["columns"].pop("chosen_ids"), "`chosen_ids`"),
        (lambda m: m["columns"]["chosen_ids"]["buffers"].reverse(), "`chosen_ids`"),
        (lambda m: m["report"].update(kept=3), "`report`"),
        (lambda m: m["columns"].update(x={"kind": "pickle", "buffers": []}), "unknown kind"),
    ],
)
def test_what_no_manifest_of_this_version_says_is_refused_by_name(tmp_path, change, message):
    small_pairs(6).save(tmp_path)
    forge(tmp_path, change)
    with pytest.raises(DataError, match=message):
        PairDataset.load(tmp_path)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"[" * 100_000, b"\xff", b"null", b"1" * 5000])
def test_a_manifest_that_is_none_is_refused(tmp_path, text):
    small_pairs(6).save(tmp_path)
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(DataError, match="manifest"):
        PairDataset.load(tmp_path)


def test_the_first_release_is_read():
    """Written by 0.1.0, never rewritten."""
    pairs = PairDataset.load(GOLDEN)
    assert pairs.prompt_ids.tolist() == [[1, 2, 3], [], [7]]
    assert pairs.chosen_ids.tolist() == [[4], [5, 6], [8, 9, 10]]
    assert pairs.rejected_ids.tolist() == [[11, 12], [13], [14]]
    assert pairs.ref_logps.tolist() == [[-1.0, -2.0], [-3.5, -4.25], [-5.0, -6.0]]
    assert pairs.rows.tolist() == [0, 2, 3]
    assert (pairs.pad_id, pairs.vocab_size) == (15, 16)


# Crashes, full disks, other processes

WRITER = """
import sys
from pair_cases import small_pairs
sets = [small_pairs(200, 1), small_pairs(300, 2)]
k = int(sys.argv[2])
print("ready", flush=True)
while True:
    sets[k % 2].save(sys.argv[1])
    k += 1
"""


def start(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": child_path(), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_killed_anywhere_the_old_or_the_new_one_is_there(tmp_path):
    """Forked writers are killed at random times; the next one sweeps and goes on."""
    a, b = small_pairs(200, 1), small_pairs(300, 2)
    path = tmp_path / "saved"
    a.save(path)
    rng = random.Random(0)
    seen = set()
    for k in range(60):
        told, saved = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                while True:
                    (b if k % 2 else a).save(path)
                    os.write(saved, b".")
                    k += 1
            finally:
                os._exit(1)
        os.close(saved)
        for _ in range(rng.randrange(3)):  # however slow the machine is, some of them save
            os.read(told, 1)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(told)
        loaded = PairDataset.load(path)
        assert tiny.same_pairs(loaded, a) or tiny.same_pairs(loaded, b)
        seen.add(len(loaded))
    assert seen == {200, 300}
    a.save(path)
    assert sorted(p.name for p in path.iterdir()) == sorted(
        [".lock", "manifest.json", data_file(path).name]
    )


@pytest.mark.slow
def test_stopped_before_every_call_the_old_or_the_new_one_is_there(tmp_path):
    """Deterministic: the process ends before its k-th open, write, fsync, rename, ..."""
    old, new = small_pairs(50, 1), small_pairs(60, 2)
    sizes = []
    for k in range(200):
        path = tmp_path / str(k)
        old.save(path)

        def work(k=k, path=path):
            stop_at(k, lambda *_, **__: os._exit(7))
            new.save(path)

        status = in_child(work)
        loaded = PairDataset.load(path)
        assert tiny.same_pairs(loaded, old) or tiny.same_pairs(loaded, new)
        sizes.append(len(loaded))
        old.save(path)
        assert tiny.same_pairs(PairDataset.load(path), old)
        assert len(list(path.iterdir())) == 3
        shutil.rmtree(path)
        if status == 0:
            break
        assert status == 7
    assert sizes == sorted(sizes), "once the manifest is renamed it is the new one"
    assert len(sizes) > 12
    assert sizes[-1] == 60


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_or_broken_disk_is_an_error_and_leaves_the_old_one(tmp_path, code):
    """Every write and fsync fails once."""
    old, new = small_pairs(50, 1), small_pairs(60, 2)
    failures = 0
    for k in range(200):
        path = tmp_path / str(k)
        old.save(path)

        def work(k=k, path=path):
            def fail(name, real, *args, **kwargs):
                if name not in ("write", "fsync", "rename", "replace"):
                    return real(*args, **kwargs)
                raise OSError(code, os.strerror(code))

            stop_at(k, fail)
            try:
                new.save(path)
            except DataError as error:
                return 3 if errno.errorcode[code] in str(error) else 4
            return 0

        status = in_child(work)
        assert status in (0, 3)
        loaded = PairDataset.load(path)
        assert tiny.same_pairs(loaded, old) or tiny.same_pairs(loaded, new)
        assert not list(path.glob("*.tmp"))
        assert not list(path.glob(".*.tmp")), "the temporary file is gone"
        shutil.rmtree(path)
        failures += status == 3
        if status == 0 and k > 40:
            break
    assert failures >= 6


def test_short_writes_are_finished(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[: max(1, len(data) // 3)]))
    pairs = small_pairs(100)
    pairs.save(tmp_path)
    monkeypatch.undo()
    assert tiny.same_pairs(PairDataset.load(tmp_path), pairs)


@pytest.mark.slow
def test_a_file_size_limit_of_the_system_is_an_error(tmp_path):
    """By the kernel itself."""
    import resource

    small_pairs(10).save(tmp_path)

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            small_pairs(5000).save(tmp_path)
        except DataError as error:
            return 3 if "EFBIG" in str(error) else 4
        return 5

    assert in_child(work) == 3
    assert tiny.same_pairs(PairDataset.load(tmp_path), small_pairs(10))
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_file_is_synced_before_its_name_counts_and_the_folder_after(tmp_path, monkeypatch):
    calls = []

    def spy(name):
        real = getattr(os, name)

        def call(*args, **kwargs):
            what = args[0]
            if name == "fsync":
                kind = "folder" if Path(f"/proc/self/fd/{what}").resolve().is_dir() else "file"
                calls.append(f"fsync {kind}")
            elif name in ("rename", "replace"):
                calls.append(f"to {'manifest' if str(args[1]).endswith('json') else 'data'}")
            elif str(what).endswith(".arrow"):
                calls.append("unlink data")
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    small_pairs(5, 1).save(tmp_path)
    for name in ("fsync", "rename", "replace", "unlink"):
        spy(name)
    small_pairs(5, 2).save(tmp_path)
    one = ["fsync file", "to data", "fsync folder", "fsync file", "to manifest", "fsync folder"]
    assert calls == [*one, "unlink data"]


@pytest.mark.slow
def test_writers_wait_for_each_other_and_readers_see_whole_data_sets(tmp_path):
    """Four writers, one of them killed while it may hold the lock, beside a reader."""
    path = tmp_path / "saved"
    sets = [small_pairs(200, 1), small_pairs(300, 2)]
    sets[0].save(path)
    writers = [start(WRITER, path, k) for k in range(4)]
    try:
        for writer in writers:
            assert writer.stdout.readline() == "ready\n"
        seen, deadline = set(), time.monotonic() + 3
        while time.monotonic() < deadline:
            loaded = PairDataset.load(path)
            assert any(tiny.same_pairs(loaded, pairs) for pairs in sets)
            seen.add(len(loaded))
            if len(seen) == 2 and writers[0].poll() is None:
                writers[0].kill()
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert seen == {200, 300}
    assert writers[1].returncode == -signal.SIGKILL, "no writer failed by itself"


def test_who_has_the_old_one_loaded_keeps_it(tmp_path):
    old = small_pairs(200, 1)
    old.save(tmp_path)
    loaded = PairDataset.load(tmp_path)
    for seed in range(2, 5):
        small_pairs(50, seed).save(tmp_path)
    assert tiny.same_pairs(loaded, old)


def test_a_loaded_data_set_is_saved_over_itself(tmp_path):
    small_pairs().save(tmp_path)
    loaded = PairDataset.load(tmp_path)
    loaded.save(tmp_path)
    assert tiny.same_pairs(loaded, small_pairs())
    assert tiny.same_pairs(PairDataset.load(tmp_path), small_pairs())


# Workers


def test_a_pickle_names_the_file_instead_of_carrying_the_ids(tmp_path):
    pairs = small_pairs(5000)
    pairs.save(tmp_path)
    loaded = PairDataset.load(tmp_path)
    loaded.pad_id = 17
    text = pickle.dumps(loaded)
    assert len(text) < pairs.rows.nbytes + 2000, "no ids in it"
    again = pickle.loads(text)
    assert tiny.same_pairs(again, loaded)
    assert again.pad_id == 17
    assert not again.chosen_ids.values.flags.writeable
    assert len(pickle.loads(pickle.dumps(again))) == 5000
    small_pairs(4000, 1).save(tmp_path)
    with pytest.raises(DataError, match="replaced"):
        pickle.loads(text)


def test_ids_that_were_exchanged_are_pickled_themselves(tmp_path):
    small_pairs().save(tmp_path)
    loaded = PairDataset.load(tmp_path)
    loaded.chosen_ids = loaded.rejected_ids
    with_ref = PairDataset.load(tmp_path).with_ref_logps(np.zeros((20, 2)))
    for pairs in (loaded, with_ref):
        assert tiny.same_pairs(pickle.loads(pickle.dumps(pairs)), pairs)


# Folders


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_folders_and_files_have_the_permissions_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        small_pairs().save(tmp_path / "a" / "b")
        small_pairs(3, 1).save(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    path = tmp_path / "a" / "b"
    assert path.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {p.stat().st_mode & 0o777 for p in path.iterdir()} == {0o666 & ~umask}
    assert len(list(path.iterdir())) == 3


def test_a_writer_that_fails_leaves_no_folder_of_its_own(tmp_path):
    with pytest.raises(RuntimeError), folder.writing(tmp_path / "new"):
        raise RuntimeError
    assert not (tmp_path / "new").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(RuntimeError), folder.writing(tmp_path / "there"):
        raise RuntimeError
    assert list((tmp_path / "there").iterdir()) == []
    small_pairs().save(tmp_path / "saved")
    with pytest.raises(RuntimeError), folder.writing(tmp_path / "saved"):
        raise RuntimeError
    assert len(PairDataset.load(tmp_path / "saved")) == 20


def test_a_writer_that_waited_for_one_that_failed_has_a_folder_and_a_lock(tmp_path):
    path, entered, order = tmp_path / "new", threading.Event(), []

    def waiting():
        entered.wait()
        with folder.writing(path) as opened:
            order.append("second")
            (opened.path / "manifest.json").write_bytes(b"x")

    thread = threading.Thread(target=waiting)
    thread.start()
    with contextlib.suppress(RuntimeError), folder.writing(path):
        entered.set()
        time.sleep(0.3)  # the other one has opened the lock file that is removed now
        order.append("first")
        raise RuntimeError
    thread.join(10)
    assert order == ["first", "second"]
    assert sorted(p.name for p in path.iterdir()) == [".lock", "manifest.json"]


def test_a_folder_of_others_is_left_alone(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(DataError, match=r"model\.safetensors"):
        small_pairs().save(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "manifest.json")
    with pytest.raises(DataError, match="manifest"):
        small_pairs().save(tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.name != ".lock"] == ["manifest.json"]
    assert (tmp_path / "manifest.json").read_bytes() == b"precious"


def test_places_that_are_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        PairDataset.load(tmp_path / "missing")
    with pytest.raises(FileNotFoundError):
        PairDataset.load(tmp_path)
    file = tmp_path / "file"
    file.write_bytes(b"")
    for call in (small_pairs().save, PairDataset.load):
        with pytest.raises(NotADirectoryError):
            call(file)
        with pytest.raises(NotADirectoryError):
            call(file / "inner")


@pytest.mark.parametrize("name", ["manifest.json", "data", ".lock"])
def test_symbolic_links_are_not_followed(tmp_path, name):
    path = tmp_path / "saved"
    small_pairs().save(path)
    inner = data_file(path) if name == "data" else path / name
    elsewhere = tmp_path / "elsewhere"
    inner.rename(elsewhere)
    inner.symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    if name == ".lock":
        with pytest.raises(DataError, match="ELOOP"):
            small_pairs(3, 1).save(path)
    else:
        with pytest.raises(DataError, match="symbolic link"):
            PairDataset.load(path)
    assert elsewhere.read_bytes() == before


@pytest.mark.parametrize("name", ["manifest.json", "data"])
def test_a_pipe_in_place_of_a_file_is_refused_at_once(tmp_path, name):
    small_pairs().save(tmp_path)
    inner = data_file(tmp_path) if name == "data" else tmp_path / name
    inner.unlink()
    os.mkfifo(inner)
    with pytest.raises(DataError, match="regular file"):
        PairDataset.load(tmp_path)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(DataError, match="no locks"):
        small_pairs().save(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_said_by_the_system(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        small_pairs().save(tmp_path / "saved")


def test_saving_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"dpo_ext\[arrow\]"):
        small_pairs().save(tmp_path / "saved")
