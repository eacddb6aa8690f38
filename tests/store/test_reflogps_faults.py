"""The store of reference log-probs under damage: a right value or a miss, and no finished shard is lost."""

import errno
import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import sampled
from disk_calls import in_child, stop_at
from pair_cases import random_pairs
from reflogps_cases import opened, pairs_and_values, same, values_of

from dpo_ext import RefLogpsError
from dpo_ext.store import manifest as manifests

pq = pytest.importorskip("pyarrow.parquet")

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

N, PART = 40, 10


def filled(folder, seed=0, fingerprint="model"):
    """A store of four shards: ten pairs a shard."""
    pairs, values = pairs_and_values(N, seed)
    store = opened(folder, fingerprint)
    for start in range(0, N, PART):
        store.put(pairs[start : start + PART], values[start : start + PART])
    return pairs, values


def shards_of(folder):
    return sorted(folder.glob("*.parquet"))


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def right_or_missing(folder, pairs, values, fingerprint="model"):
    """The indices of the pairs that are missing; every other one has its value, bit by bit."""
    store = opened(folder, fingerprint)
    missing = store.missing(pairs)
    rest = np.setdiff1d(np.arange(len(pairs)), missing)
    assert same(store.get(pairs, index=rest), values[rest])
    if len(missing):
        with pytest.raises(RefLogpsError, match="are missing"):
            store.get(pairs)
    return missing


def heals(folder, pairs, values):
    """What is missing can be put again, and then all is there."""
    store = opened(folder)
    missing = store.missing(pairs)
    assert store.put(pairs, values[missing], index=missing) > 0
    assert same(opened(folder).get(pairs), values)


# Damage


def each_bit(data):
    for at in range(len(data)):
        for bit in range(8):
            bad = bytearray(data)
            bad[at] ^= 1 << bit
            yield at, bytes(bad)


@pytest.mark.slow
def test_every_flipped_bit_of_a_shard_is_a_miss(tmp_path):
    pairs, values = pairs_and_values(6)
    opened(tmp_path).put(pairs[:3], values[:3])
    (path,) = shards_of(tmp_path)
    opened(tmp_path).put(pairs[3:], values[3:])
    good = path.read_bytes()
    for at, bad in each_bit(good):
        path.write_bytes(bad)
        store = opened(tmp_path)
        assert store.missing(pairs).tolist() == [0, 1, 2], f"byte {at}"
        assert same(store.get(pairs[3:]), values[3:])
    assert store.stats.damaged == (path.name,)
    with pytest.raises(RefLogpsError, match=f"shards damaged: {path.name}"):
        store.get(pairs)
    heals(tmp_path, pairs, values)
    path.write_bytes(good)
    assert same(opened(tmp_path).get(pairs), values)
    assert same(store.get(pairs), values)
    assert store.stats.damaged == ()


@pytest.mark.slow
def test_every_truncation_and_every_tail_of_a_shard_is_a_miss(tmp_path):
    pairs, values = pairs_and_values(3)
    opened(tmp_path).put(pairs, values)
    (path,) = shards_of(tmp_path)
    good = path.read_bytes()
    for length in range(len(good)):
        for bad in (good[:length], good[:length] + bytes(len(good) - length)):
            if bad != good:
                path.write_bytes(bad)
                assert right_or_missing(tmp_path, pairs, values).tolist() == [0, 1, 2]
    for tail in (b"\0", b"x", good):
        path.write_bytes(good + tail)
        assert right_or_missing(tmp_path, pairs, values).tolist() == [0, 1, 2]


@pytest.mark.slow
def test_every_flipped_bit_and_every_truncation_of_the_manifest_loses_no_shard(tmp_path):
    pairs, values = pairs_and_values(3)
    opened(tmp_path).put(pairs, values)
    path = tmp_path / "manifest.json"
    good = path.read_bytes()
    noticed = 0
    for bad in [bad for _, bad in each_bit(good)] + [good[:k] for k in range(len(good))]:
        path.write_bytes(bad)
        store = opened(tmp_path)
        assert same(store.get(pairs), values)
        noticed += bool(store.stats.notes)
    assert noticed > 0.9 * 9 * len(good), "white space carries nothing"
    path.write_bytes(good[:-20])
    more = random_pairs(3, seed=5)
    store = opened(tmp_path)
    assert "manifest is damaged" in store.stats.notes[0]
    store.put(more, values_of(more))
    assert store.stats.notes == ()
    assert len(manifest_of(tmp_path)["shards"]) == 2
    assert right_or_missing(tmp_path, pairs, values).tolist() == []


def test_without_a_manifest_the_shards_say_of_which_reference_they_are(tmp_path):
    pairs, values = filled(tmp_path)
    (tmp_path / "manifest.json").unlink()
    assert same(opened(tmp_path).get(pairs), values)
    with pytest.raises(RefLogpsError, match="the log-probs are of another reference"):
        opened(tmp_path, "other")


def test_a_damaged_manifest_without_a_shard_is_refused(tmp_path):
    """It may be anybody's."""
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(RefLogpsError, match="expected the format"):
        opened(tmp_path)


@pytest.mark.parametrize("key", ["version", "format"])
def test_a_whole_manifest_of_another_version_is_refused_by_name(tmp_path, key):
    filled(tmp_path)
    manifest = manifest_of(tmp_path)
    del manifest["checksum"]
    manifest[key] = 2
    (tmp_path / "manifest.json").write_bytes(manifests.sealed(manifest))
    with pytest.raises(RefLogpsError, match=r"expected (version 1 of )?the format"):
        opened(tmp_path)


@pytest.mark.parametrize("change", [{"shards": 3}, {"shards": [[1]]}, {"fingerprint": []}])
def test_a_sealed_manifest_that_says_nonsense_is_refused(tmp_path, change):
    filled(tmp_path)
    manifest = {**manifest_of(tmp_path), **change}
    del manifest["checksum"]
    (tmp_path / "manifest.json").write_bytes(manifests.sealed(manifest))
    with pytest.raises(RefLogpsError, match="manifest"):
        opened(tmp_path)


def test_a_deleted_shard_is_a_miss_and_is_named(tmp_path):
    pairs, values = filled(tmp_path)
    reader = opened(tmp_path)
    assert same(reader.get(pairs), values)
    gone = shards_of(tmp_path)[2]
    gone.unlink()
    missing = right_or_missing(tmp_path, pairs, values)
    assert len(missing) == PART
    for store in (reader, opened(tmp_path)):
        assert store.stats.lost == (gone.name,)
        assert store.missing(pairs).tolist() == missing.tolist()
        with pytest.raises(RefLogpsError, match=f"shards gone: {gone.name}"):
            store.get(pairs)
    # Who had read it must write it again, and not believe that it is there.
    assert reader.put(pairs, values) == 2 * PART
    assert same(opened(tmp_path).get(pairs), values)
    assert opened(tmp_path).stats.lost == ()


def test_a_shard_damaged_after_it_was_read_is_a_miss_and_is_written_again(tmp_path):
    """Who had read it must not believe that what it knows is on the disk."""
    pairs, values = filled(tmp_path)
    reader = opened(tmp_path)
    assert same(reader.get(pairs), values)
    path = shards_of(tmp_path)[1]
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert reader.put(pairs, values) == 2 * PART
    assert same(opened(tmp_path).get(pairs), values)
    assert opened(tmp_path).stats.damaged == (), "the same rows make the same file"


def test_swapped_shards_are_seen_by_their_names(tmp_path):
    pairs, values = filled(tmp_path)
    a, b = shards_of(tmp_path)[:2]
    a.rename(tmp_path / "x")
    b.rename(a)
    (tmp_path / "x").rename(b)
    missing = right_or_missing(tmp_path, pairs, values)
    assert len(missing) == 2 * PART
    assert opened(tmp_path).stats.damaged == (a.name, b.name)
    heals(tmp_path, pairs, values)


def test_a_shard_of_another_reference_is_never_read(tmp_path):
    pairs, values = filled(tmp_path / "a")
    other = values + 1
    opened(tmp_path / "b", "other").put(pairs, other)
    (foreign,) = shards_of(tmp_path / "b")
    for path in shards_of(tmp_path / "a")[1:]:
        path.unlink()
    shutil.copy(foreign, tmp_path / "a")
    assert len(right_or_missing(tmp_path / "a", pairs, values)) == 3 * PART
    assert opened(tmp_path / "a").stats.foreign == (foreign.name,)
    heals(tmp_path / "a", pairs, values)
    shutil.copy(tmp_path / "b" / "manifest.json", tmp_path / "a")
    with pytest.raises(RefLogpsError, match="`name`: model, and other in the other"):
        opened(tmp_path / "a")


def test_a_shard_of_another_folder_of_the_same_reference_counts(tmp_path):
    pairs, values = filled(tmp_path / "a")
    opened(tmp_path / "b").put(pairs[:1], values[:1])
    for path in shards_of(tmp_path / "a"):
        shutil.copy(path, tmp_path / "b")
    assert same(opened(tmp_path / "b").get(pairs), values)


def test_a_shard_that_is_sound_and_holds_nonsense_is_a_miss(tmp_path):
    """Made by hand, with the right name: what only malice or another program makes."""
    import pyarrow as pa

    from dpo_ext.store.folder import Digest

    pairs, values = filled(tmp_path)
    reference = opened(tmp_path).fingerprint.digest
    facts = {"version": 1, "reference": reference}
    keys = pa.array([b"k" * 16], pa.binary(16))
    logps = pa.array([-1.0])
    made = [
        ({"key": keys, "logp": pa.array([float("nan")])}, facts),
        ({"key": keys, "logp": pa.array([None], pa.float64())}, facts),
        ({"key": pa.array([b"k"]), "logp": logps}, facts),
        ({"key": keys, "logp": pa.array([1])}, facts),
        ({"key": keys}, facts),
        ({"key": keys, "logp": logps}, {**facts, "version": 2}),
        ({"key": keys, "logp": logps}, {"version": 1}),
        ({"key": keys, "logp": logps}, []),
    ]
    for columns, said in made:
        table = pa.table(columns).replace_schema_metadata({"dpo_ext": json.dumps(said)})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        data = sink.getvalue().to_pybytes()
        digest = Digest()
        digest.update(memoryview(data))
        (tmp_path / f"{digest.hexdigest()[:32]}.parquet").write_bytes(data)
    digest = Digest()
    digest.update(memoryview(b"junk"))
    (tmp_path / f"{digest.hexdigest()[:32]}.parquet").write_bytes(b"junk")
    assert right_or_missing(tmp_path, pairs, values).tolist() == []
    stats = opened(tmp_path).stats
    assert (stats.rows, len(stats.damaged)) == (2 * N, len(made) + 1)


def test_a_column_that_a_later_version_adds_is_no_matter(tmp_path):
    import pyarrow as pa

    from dpo_ext.store.folder import Digest

    pairs, values = pairs_and_values(5)
    opened(tmp_path).put(pairs, values)
    (path,) = shards_of(tmp_path)
    table = pq.read_table(path)
    tokens = pa.array([[-0.5]] * len(table), pa.list_(pa.float32()))
    sink = pa.BufferOutputStream()
    pq.write_table(table.append_column("token_logps", tokens), sink)
    digest = Digest()
    digest.update(memoryview(sink.getvalue().to_pybytes()))
    path.unlink()
    (tmp_path / f"{digest.hexdigest()[:32]}.parquet").write_bytes(sink.getvalue().to_pybytes())
    assert same(opened(tmp_path).get(pairs), values)


def test_a_huge_file_in_place_of_a_shard_costs_no_memory(tmp_path):
    import resource

    pairs, values = filled(tmp_path)
    path = shards_of(tmp_path)[0]
    with path.open("r+b") as file:
        file.truncate(1 << 42)  # sparse
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(right_or_missing(tmp_path, pairs, values)) == PART
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "KiB"


@pytest.mark.parametrize("what", ["link", "pipe", "folder"])
def test_what_is_no_file_is_no_shard(tmp_path, what):
    pairs, values = filled(tmp_path / "s")
    path = shards_of(tmp_path / "s")[0]
    path.rename(tmp_path / "kept")
    if what == "link":
        path.symlink_to(tmp_path / "kept")
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    assert len(right_or_missing(tmp_path / "s", pairs, values)) == PART
    assert opened(tmp_path / "s").stats.damaged == (path.name,)


# Writers that die, and disks that are full


def finished(pairs, values, folder, acknowledged):
    """What was acknowledged is there, and all that is there is right."""
    missing = right_or_missing(folder, pairs, values)
    assert not set(missing.tolist()) & set(acknowledged)


@pytest.mark.slow
def test_killed_anywhere_no_finished_shard_is_lost(tmp_path):
    """Forked writers are killed at random times; 300 times in `make deep`."""
    pairs, values = pairs_and_values(2000)
    rng = random.Random(0)
    rounds = 300 if sampled.WHOLE else 25
    alive = 0
    for k in range(rounds):
        folder = tmp_path / str(k)
        told, said = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                store = opened(folder)
                for start in range(0, 2000, 20):
                    store.put(pairs[start : start + 20], values[start : start + 20])
                    os.write(said, bytes([start // 20]))
            finally:
                os._exit(1)
        os.close(said)
        parts = [os.read(told, 1) for _ in range(rng.randrange(4))]
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while part := os.read(told, 100):
            parts.append(part)
        os.close(told)
        acknowledged = [20 * part + i for part in b"".join(parts) for i in range(20)]
        finished(pairs, values, folder, acknowledged)
        alive += bool(acknowledged)
        if k % 5 == 0:
            store = opened(folder)
            store.put(pairs, values)
            assert not list(folder.glob(".*.tmp")), "what the dead left is swept"
            assert same(opened(folder).get(pairs), values)
    assert alive > rounds / 3


@pytest.mark.slow
def test_stopped_before_every_call_the_old_values_are_there(tmp_path):
    """Deterministic: the process ends before its k-th open, write, fsync, rename, ..."""
    pairs, values = pairs_and_values(20)
    there = []
    for k in range(200):
        folder = tmp_path / str(k)
        opened(folder).put(pairs[:10], values[:10])
        store = opened(folder)

        def work(k=k, store=store):
            stop_at(k, lambda *_, **__: os._exit(7))
            store.put(pairs, values)

        status = in_child(work)
        missing = right_or_missing(folder, pairs, values)
        assert set(missing) <= set(range(10, 20))
        there.append(20 - len(missing))
        opened(folder).put(pairs, values)
        assert same(opened(folder).get(pairs), values)
        assert len(list(folder.iterdir())) == 4
        shutil.rmtree(folder)
        if status == 0:
            break
        assert status == 7
    assert there == sorted(there), "from the rename of the shard on it is there"
    assert len(there) > 12
    assert there[-1] == 20


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_or_broken_disk_is_an_error_and_loses_nothing(tmp_path, code):
    """Every write, fsync and rename fails once."""
    pairs, values = pairs_and_values(20)
    failures = 0
    for k in range(200):
        folder = tmp_path / str(k)
        opened(folder).put(pairs[:10], values[:10])
        store = opened(folder)

        def work(k=k, store=store, folder=folder):
            def fail(name, real, *args, **kwargs):
                if name not in ("write", "fsync", "rename", "replace"):
                    return real(*args, **kwargs)
                raise OSError(code, os.strerror(code))

            stop_at(k, fail)
            try:
                store.put(pairs, values)
            except RefLogpsError as error:
                # The same store goes on, once there is room.
                again = store.put(pairs, values) in (0, 20) and same(store.get(pairs), values)
                return 3 if errno.errorcode[code] in str(error) and again else 4
            return 0

        status = in_child(work)
        assert status in (0, 3)
        assert same(opened(folder).get(pairs), values)
        assert not list(folder.glob(".*.tmp")), "the temporary file is gone"
        shutil.rmtree(folder)
        failures += status == 3
        if status == 0 and k > 40:
            break
    assert failures >= 6


def test_short_writes_are_finished(tmp_path, monkeypatch):
    pairs, values = pairs_and_values()
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[: max(1, len(data) // 3)]))
    opened(tmp_path).put(pairs, values)
    monkeypatch.undo()
    assert same(opened(tmp_path).get(pairs), values)


@pytest.mark.slow
def test_a_file_size_limit_of_the_system_is_an_error(tmp_path):
    """By the kernel itself."""
    import resource

    pairs, values = pairs_and_values(500)
    opened(tmp_path).put(pairs[:3], values[:3])

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            opened(tmp_path).put(pairs, values)
        except RefLogpsError as error:
            return 3 if "EFBIG" in str(error) else 4
        return 5

    assert in_child(work) == 3
    assert len(right_or_missing(tmp_path, pairs, values)) == 497
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.slow
def test_a_read_only_folder_is_read_and_not_written(tmp_path):
    """As a user to whom the folder does not belong."""
    pairs, values = filled(tmp_path / "s")
    others = random_pairs(3, seed=8)
    for path in (tmp_path / "s").iterdir():
        path.chmod(0o444)
    (tmp_path / "s").chmod(0o555)
    chain = [tmp_path / "s", *(tmp_path / "s").parents]
    reachable = [folder for folder in chain if folder.stat().st_mode & 0o005 != 0o005]

    def work():
        if os.geteuid() == 0:
            for folder in reachable:  # pytest makes its folders for one user alone
                folder.chmod(0o755 if folder != tmp_path / "s" else 0o555)
            os.setgid(65534)
            os.setuid(65534)
        store = opened(tmp_path / "s")
        if not same(store.get(pairs), values) or store.put(pairs, values) != 0:
            return 4
        if len(store.missing(others)) != 3:
            return 5
        try:
            store.put(others, values_of(others))
        except PermissionError as error:
            return 3 if str(tmp_path / "s") in str(error) else 6
        return 7

    try:
        assert in_child(work) == 3
    finally:
        (tmp_path / "s").chmod(0o755)
    assert len(shards_of(tmp_path / "s")) == 4


def test_a_read_only_file_system_is_an_error(tmp_path, monkeypatch):
    pairs, values = filled(tmp_path)
    others = random_pairs(3, seed=8)
    real = os.open

    def refuse(path, flags, *args, **kwargs):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(RefLogpsError, match="EROFS"):
        opened(tmp_path).put(others, values_of(others))
    assert same(opened(tmp_path).get(pairs), values)


def test_a_shard_is_synced_before_its_name_counts_and_the_folder_after(tmp_path, monkeypatch):
    from pathlib import Path

    calls = []

    def spy(name):
        real = getattr(os, name)

        def call(*args, **kwargs):
            if name == "fsync":
                kind = "folder" if Path(f"/proc/self/fd/{args[0]}").resolve().is_dir() else "file"
                calls.append(f"fsync {kind}")
            else:
                calls.append(f"to {'manifest' if str(args[1]).endswith('json') else 'shard'}")
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    pairs, values = pairs_and_values(10)
    store = opened(tmp_path)
    store.put(pairs[:5], values[:5])
    for name in ("fsync", "rename", "replace"):
        spy(name)
    store.put(pairs, values)
    assert calls == [
        "fsync file",
        "to shard",
        "fsync folder",
        "fsync file",
        "to manifest",
        "fsync folder",
    ]


@pytest.mark.slow
def test_writers_at_once_lose_nothing_and_readers_see_whole_shards(tmp_path):
    """Three writers of overlapping parts, one of them killed while it may hold the lock."""
    pairs, values = pairs_and_values(600)
    rng = np.random.default_rng(0)

    def write(order):
        store = opened(tmp_path / "s")
        for start in order:
            part = np.arange(start, min(start + 30, 600))
            store.put(pairs, values[part], index=part)
        return 0

    orders = [rng.permutation(np.arange(0, 600, 15)).tolist() for _ in range(3)]
    children = []
    for order in orders:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = write(order)
            finally:
                os._exit(status)
        children.append(child)
    reader = opened(tmp_path / "s")
    time.sleep(0.05)
    os.kill(children[0], signal.SIGKILL)
    seen = []
    while len(seen) < 5 or len(seen) % 40:
        missing = reader.missing(pairs)
        rest = np.setdiff1d(np.arange(600), missing)
        assert same(reader.get(pairs, index=rest), values[rest])
        seen.append(len(rest))
    assert seen == sorted(seen), "what was there stays"
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes[1:] == [0, 0]
    assert same(opened(tmp_path / "s").get(pairs), values)
    stats = opened(tmp_path / "s").stats
    assert (stats.damaged, stats.lost, stats.foreign, stats.notes) == ((), (), (), ())
    named = [name for name, _, _ in manifest_of(tmp_path / "s")["shards"]]
    assert named == [path.name for path in shards_of(tmp_path / "s")]
    rows = sum(pq.read_metadata(path).num_rows for path in shards_of(tmp_path / "s"))
    assert rows == stats.rows, "no row was written twice"


def test_a_clock_that_was_set_back_changes_nothing(tmp_path, monkeypatch):
    pairs, values = filled(tmp_path)
    for path in tmp_path.iterdir():
        os.utime(path, (2**33, 2**33))  # in the year 2242
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    others = random_pairs(20, seed=3)
    store = opened(tmp_path)
    store.put(others, values_of(others))
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))
    assert same(opened(tmp_path).get(pairs), values)
    assert same(store.get(others), values_of(others))
    store.put(pairs.concat(others), np.concatenate([values, values_of(others)]))
    assert opened(tmp_path).stats.shards == 5
