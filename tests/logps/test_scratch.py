"""Memory of chunks of logits: lent again once nobody holds it, and never before."""

import mmap
import threading
from pathlib import Path

import pytest
import torch

from dpo_ext.torch import ScoreTable, sequence_logps
from dpo_ext.torch.logps.scratch import HUGE_BYTES, KEPT, lent

CPU = torch.device("cpu")
LARGE = (16, HUGE_BYTES // 32)


def large(shape=LARGE, dtype=torch.float32):
    return lent(shape, dtype, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_memory_that_nobody_holds_is_lent_again(dtype):
    shape = (16, HUGE_BYTES // 32)
    first = large(shape, dtype)
    assert (first.shape, first.dtype, first.is_contiguous()) == (shape, dtype, True)
    place = first.data_ptr()
    del first
    assert large(shape, dtype).data_ptr() == place


def test_a_view_keeps_its_memory():
    whole = large()
    view = whole[3:5]
    view.fill_(7.0)
    del whole
    others = [large().fill_(0.0) for _ in range(KEPT + 1)]
    assert len({view.data_ptr(), *(other.data_ptr() for other in others)}) == KEPT + 2
    assert (view == 7.0).all()


def test_a_smaller_chunk_takes_larger_memory_and_a_much_larger_one_its_own():
    first = large()
    place = first.data_ptr()
    del first
    second = large((15, LARGE[1]))
    assert second.data_ptr() == place
    del second
    assert large((32, LARGE[1])).numel() == 32 * LARGE[1]


def test_small_chunks_and_other_devices_have_the_allocators():
    assert lent((2, 3), torch.float32, CPU).shape == (2, 3)
    assert lent(LARGE, torch.float32, torch.device("meta")).is_meta


def test_threads_never_share():
    held, together = [], threading.Barrier(4)

    def take():
        for _ in range(20):
            mine = large()
            together.wait()
            held.append(mine.data_ptr())
            together.wait()
            del mine

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at in range(0, len(held), 4):
        assert len(set(held[at : at + 4])) == 4


def test_a_gradient_takes_the_memory_of_the_last_one_and_leaves_what_is_held():
    R, V = LARGE
    logits = torch.randn(R, V, requires_grad=True)
    table = ScoreTable(
        logit_rows=torch.arange(R),
        targets=torch.arange(R, dtype=torch.int32),
        seq_offsets=torch.arange(0, R + 1, R // 2, dtype=torch.int32),
    )

    def gradient():
        (grad,) = torch.autograd.grad(sequence_logps(logits, table).sum(), logits)
        return grad

    held = gradient()
    expected = held.clone()
    place = gradient().data_ptr()
    assert place != held.data_ptr()
    again = gradient()
    assert again.data_ptr() == place
    assert torch.equal(again, expected)
    assert torch.equal(held, expected)


@pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="this system has no MADV_FREE")
def test_free_memory_is_the_systems_to_take():
    whole = large().fill_(1.0)
    del whole
    lazily = sum(
        int(line.split()[1])
        for line in Path("/proc/self/smaps").read_text().splitlines()
        if line.startswith("LazyFree")
    )
    assert lazily >= HUGE_BYTES * 2 // 1024 * 0.9
