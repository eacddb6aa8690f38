"""The loader: the plan's batches in order, errors in the loop, no thread left behind."""

import gc
import os
import threading
import time
from itertools import pairwise

import pytest
import torch
from fake_plan import FakeBatch, FakePlan
from places import ROOT, child_path

from dpo_ext import PairDataset
from dpo_ext.torch import PairLoader, sequence_logps


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    gc.collect()
    assert [t for t in threading.enumerate() if t.name == "dpo_ext-loader"] == []


def numbers(batches):
    return [batch.i for batch in batches]


@pytest.mark.parametrize("prefetch", [0, 1, 2, 50])
def test_batches_come_in_order_and_again(prefetch):
    plan = FakePlan(7)
    loader = PairLoader(plan, prefetch=prefetch)
    assert len(loader) == 7
    assert numbers(loader) == list(range(7))
    assert numbers(loader) == list(range(7))
    assert {main for _, main in plan.built} == {prefetch == 0}
    assert {batch.where for batch in loader} == {"cpu"}


def test_an_empty_plan():
    assert list(PairLoader(FakePlan(0))) == []


def test_batches_go_to_the_device():
    assert next(iter(PairLoader(FakePlan(1), device="meta"))).where == "meta"


def test_no_more_than_prefetch_batches_are_built_ahead():
    plan = FakePlan(20)
    batches = iter(PairLoader(plan, prefetch=3))
    next(batches)
    deadline = time.monotonic() + 5
    while len(plan.built) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(plan.built) == 4  # one taken, three ahead


def test_the_thread_works_while_the_loop_does():
    plan = FakePlan(10, seconds=0.02)
    start = time.monotonic()
    for _ in PairLoader(plan):
        time.sleep(0.02)
    assert time.monotonic() - start < 0.36  # one after the other it takes 0.4 s


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_is_raised_in_the_loop_at_its_batch(prefetch):
    batches = iter(PairLoader(FakePlan(5, bad=3), prefetch=prefetch))
    assert [next(batches).i for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="batch 3"):
        next(batches)
    assert list(batches) == []


def test_break_and_exceptions_end_the_thread():
    plan = FakePlan(100)
    for batch in PairLoader(plan):
        if batch.i == 1:
            break
    assert len(plan.built) <= 5

    def divide():
        for batch in PairLoader(plan):
            _ = 1 // batch.i

    with pytest.raises(ZeroDivisionError):
        divide()
    assert not [t for t in threading.enumerate() if t.name == "dpo_ext-loader"]


def test_an_iterator_that_was_never_used_ends_its_thread():
    batches = iter(PairLoader(FakePlan(100)))
    assert [t for t in threading.enumerate() if t.name == "dpo_ext-loader"]
    del batches


def test_two_iterations_at_once_do_not_mix():
    loader = PairLoader(FakePlan(4))
    assert [(a.i, b.i) for a, b in zip(loader, loader, strict=True)] == [(i, i) for i in range(4)]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_set_epoch_reaches_the_plan_and_ends_an_open_iteration(prefetch):
    loader = PairLoader(FakePlan(4), prefetch=prefetch)
    loader.set_epoch(3)
    assert [batch.epoch for batch in loader] == [3] * 4
    batches = iter(loader)
    next(batches)
    loader.set_epoch(4)
    with pytest.raises(RuntimeError, match="epoch of the plan was set"):
        next(batches)
    assert [batch.epoch for batch in loader] == [4] * 4


def test_batches_of_a_data_set_are_scored():
    """The whole road: ids, plan, loader, table, log-probs; every token of every completion once."""
    pairs = PairDataset.from_ids([[1, 2], [6], [3, 3]], [[3, 4], [7], [1]], [[5], [8, 9], [2]])
    loader = PairLoader(pairs.plan(layout="padded", pairs_per_batch=2, seed=3))
    seen = {}
    for batch in loader:
        logits = torch.nn.functional.one_hot(batch.input_ids, 10).float()  # "repeat the token"
        logps = sequence_logps(logits, batch.table)
        log_z = torch.tensor(9.0 + torch.e).log()
        for row, pair in enumerate(batch.pair_index.tolist()):
            sides = (pairs.chosen_ids[pair], pairs.rejected_ids[pair])
            for side, completion in enumerate(sides):
                before = [*pairs.prompt_ids[pair], *completion]
                repeats = sum(int(a == b) for a, b in pairwise(before))
                repeats -= sum(int(a == b) for a, b in pairwise(pairs.prompt_ids[pair]))
                expected = repeats - len(completion) * log_z
                assert logps[row, side].item() == pytest.approx(float(expected), abs=1e-5)
            seen[pair] = True
    assert sorted(seen) == [0, 1, 2]


def test_wrong_arguments():
    with pytest.raises(TypeError, match="`plan` must have a length"):
        PairLoader(iter([]))
    with pytest.raises(TypeError, match="`prefetch`"):
        PairLoader(FakePlan(1), prefetch=1.5)
    with pytest.raises(ValueError, match="`prefetch`"):
        PairLoader(FakePlan(1), prefetch=-1)


@pytest.mark.slow
def test_a_process_that_stops_in_the_middle_exits():
    import subprocess
    import sys

    code = (
        "from fake_plan import FakePlan; "
        "from dpo_ext.torch import PairLoader; it = iter(PairLoader(FakePlan(9))); next(it); "
        "print('first'); "
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": child_path()},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("first\n", "")


@pytest.mark.gpu
def test_batches_are_pinned_and_copied_without_waiting():
    class Pinned(FakeBatch):
        def __init__(self, tensor):
            self.tensor = tensor

        def pin_memory(self):
            return Pinned(self.tensor.pin_memory())

        def to(self, device, *, non_blocking=False):
            assert non_blocking
            assert self.tensor.is_pinned()
            return Pinned(self.tensor.to(device, non_blocking=True))

    class Plan(FakePlan):
        def __getitem__(self, i):
            return Pinned(torch.full((1 << 20,), i))

    for i, batch in enumerate(PairLoader(Plan(20), device="cuda")):
        assert batch.tensor.device.type == "cuda"
        assert bool((batch.tensor == i).all())


def test_what_is_no_plan_of_batches_is_refused_by_name():
    pairs = PairDataset.from_ids([[1, 2]], [[3]], [[4]])
    with pytest.raises(
        TypeError, match=r"must be a BatchPlan, found PairDataset, a data set\n.*plan"
    ):
        PairLoader(pairs)
    for prefetch in (0, 1):
        with pytest.raises(TypeError, match="must give batches, found dict"):
            next(iter(PairLoader([{"input_ids": [1]}], prefetch=prefetch)))


def test_options_of_loaders_with_workers_are_refused_with_a_word_on_the_thread():
    plan = FakePlan(1)
    with pytest.raises(TypeError, match=r"`num_workers` is no option.*one thread.*\n.*prefetch"):
        PairLoader(plan, num_workers=2)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("prefetch", [0, 1])
@pytest.mark.parametrize("row", [([], [1], [2]), ([], [], []), ([3], [], [])])
def test_batches_of_no_slots_are_those_of_the_plan(layout, prefetch, row):
    """Arrays of no items at one address would pass for one array."""
    pairs = PairDataset.from_ids(*([list(ids)] * 3 for ids in row))
    for size in (1, 3):
        plan = pairs.plan(layout=layout, pairs_per_batch=size, shuffle=False)
        for _ in range(2):
            for batch, expected in zip(PairLoader(plan, prefetch=prefetch), plan, strict=True):
                assert batch.input_ids.shape == expected.input_ids.shape
                assert batch.pair_index.tolist() == expected.pair_index.tolist()
