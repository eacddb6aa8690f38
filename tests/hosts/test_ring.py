"""Reused buffers: taken back when the last thing made from them is gone, never before."""

import gc
import itertools
import threading

import numpy as np
import pytest
from pair_cases import OPTIONS, batch_bits, random_pairs

torch = pytest.importorskip("torch")

from dpo_ext.torch import PairLoader  # noqa: E402
from dpo_ext.torch.ring import Ring  # noqa: E402


def plan_of(layout, n=60):
    pairs = random_pairs(n).with_ref_logps(np.random.default_rng(0).normal(size=(n, 2)))
    return pairs.plan(layout=layout, seed=5, **OPTIONS[layout])


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_batches_that_are_kept_are_never_written_over(layout, prefetch):
    plan = plan_of(layout)
    want = [batch_bits(batch) for batch in plan]
    loader = PairLoader(plan, prefetch=prefetch)
    assert [batch_bits(batch) for batch in loader] == want  # one by one
    kept = list(loader)
    assert [batch_bits(batch) for batch in loader] == want
    assert [batch_bits(batch) for batch in kept] == want
    some = []
    for i, batch in enumerate(loader):
        if i % 3 == 0:
            some.append((i, batch))
    for _ in loader:
        pass
    assert [batch_bits(batch) for _, batch in some] == [want[i] for i, _ in some]


def test_arrays_outlive_loader_and_plan():
    plan = plan_of("packed")
    want = batch_bits(plan[0])
    loader = PairLoader(plan)
    batches = iter(loader)
    batch = next(batches)
    rows, table = batch.input_ids[:, 1:], batch.table
    del batches, loader, plan
    gc.collect()
    noise = [np.full(1 << 14, 7) for _ in range(50)]
    assert batch_bits(batch) == want
    del batch
    gc.collect()
    noise += [np.full(1 << 14, 7) for _ in range(50)]
    whole = np.frombuffer(want["input_ids"], np.int64).reshape(-1, 60)
    assert rows.tolist() == whole[:, 1:].tolist()
    assert table.targets.numpy().tobytes() == want["targets"]


@pytest.mark.parametrize("part", ["input_ids", "targets", "seq_offsets", "table", "pair_index"])
def test_one_view_keeps_the_whole_buffer(part):
    plan = plan_of("padded")
    loader = PairLoader(plan, prefetch=0)
    for _ in loader:  # the ring learns its size
        pass
    batches = iter(loader)
    held = getattr(next(batches), part)
    if part != "table":
        held = held.view(-1)[1:].numpy()
    value = held.host_offsets.clone() if part == "table" else held.copy()
    for _ in range(3):
        for _ in loader:
            pass
    assert np.array_equal(held.host_offsets if part == "table" else held, value)


def test_a_buffer_is_used_again_once_nothing_holds_it():
    plan = plan_of("padded")
    loader = PairLoader(plan, prefetch=2)
    for _ in loader:
        pass
    addresses = [batch.input_ids.data_ptr() for batch in loader]
    assert len(addresses) == 20
    assert len(set(addresses)) <= 4  # two ahead, one being filled, one here
    kept = list(loader)
    assert len({batch.input_ids.data_ptr() for batch in kept}) == len(kept)


def test_a_ring_waits_for_the_copy_that_reads_a_buffer():
    class Event:
        waited = 0

        def synchronize(self):
            Event.waited += 1

    ring = Ring(2)
    ring.size_bytes = 1024
    loan = ring.lend()
    array = loan.take(16, np.int64)
    loan.end()
    loan.copied(Event())
    address = array.ctypes.data
    other = ring.lend().take(16, np.int64)
    assert other.ctypes.data != address
    assert Event.waited == 0
    del array
    again = ring.lend()
    assert Event.waited == 1
    assert again.take(16, np.int64).ctypes.data == address
    again.copied(Event())
    again.end()
    del ring, other, loan, again
    assert Event.waited == 2  # memory with a copy in flight is not handed back to the system


def test_arrays_of_a_buffer_are_aligned_apart_and_as_large_as_asked():
    ring = Ring(1)
    for _ in range(2):  # allocated one by one, then parts of one buffer
        loan = ring.lend()
        arrays = [loan.take(n, t) for n in (0, 1, 7, 100) for t in (np.int32, np.int64)]
        assert [a.size for a in arrays] == [n for n in (0, 1, 7, 100) for _ in range(2)]
        for i, array in enumerate(arrays):
            array[:] = i
        assert all((array == i).all() for i, array in enumerate(arrays))
        assert all(a.ctypes.data % 64 == 0 for a in arrays if a.size)
        spans = [(a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays if a.size]
        assert all(a <= b for (_, a), (b, _) in itertools.pairwise(sorted(spans)))
        loan.end()


def test_buffers_come_back_from_other_threads():
    plan = plan_of("padded")
    want = [batch_bits(batch) for batch in plan]
    loader = PairLoader(plan)
    found = {}

    def read(batch, i):
        found[i] = batch_bits(batch)

    for round_ in range(3):
        threads = []
        for i, batch in enumerate(loader):
            threads.append(threading.Thread(target=read, args=(batch, i)))
            threads[-1].start()
        for thread in threads:
            thread.join()
        assert [found[i] for i in range(len(want))] == want, round_
        found.clear()


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_batches_reach_the_gpu_from_pinned_buffers(layout):
    plan = plan_of(layout)
    want = [batch_bits(batch) for batch in plan]
    loader = PairLoader(plan, device="cuda")
    for _ in range(3):
        found = []
        for batch in loader:
            torch.cuda._sleep(100_000)
            found.append(batch)
        assert [batch_bits(batch.to("cpu")) for batch in found] == want
    loan = loader._ring.lend()
    assert torch.from_numpy(loan.take(8, np.int64)).is_pinned()
    assert list(itertools.islice(loader, 1))[0].input_ids.is_cuda  # noqa: RUF015
