"""Log-probs over two processes: vocabulary and context in parts give what one process gives."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import warm
from logps_cases import HOWS, random_case

from dpo_ext import TensorError
from dpo_ext.torch import ScoreTable, linear_sequence_logps, sequence_logps
from dpo_ext.torch.parallel import (
    all_reduce_gradient,
    context_parallel_sequence_logps,
    context_parallel_table,
    vocab_parallel_sequence_logps,
)

V = 13
SPLITS = [9, 1, 13, 0]  # columns of rank 0: uneven shards, and one that is empty
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def upstream(table):
    generator = torch.Generator().manual_seed(table.n_tokens)
    return torch.randn(table.n_groups, 2, generator=generator)


def vocab_cases():
    for seed in range(4):
        for dtype in DTYPES:
            logits, table = random_case(seed, V=V, dtype=dtype, weights=seed % 2 == 0, longest=5)
            yield logits, table, HOWS[seed % len(HOWS)], SPLITS[seed]
    logits, table = random_case(9, V=V, longest=5)
    logits[:, :9] = -math.inf  # a shard without any mass
    yield logits, table, {}, 9
    logits, table = random_case(10, V=V, longest=5, spread=200.0)  # 1 - p underflows
    yield logits, table, HOWS[-1], 6


def check_vocabulary(rank):
    for logits, table, how, split in vocab_cases():
        columns = slice(0, split) if rank == 0 else slice(split, V)
        shard = logits[:, columns].clone().requires_grad_()
        value = vocab_parallel_sequence_logps(shard, table, vocab_start=columns.start, **how)
        value.backward(upstream(table))
        whole = logits.clone().requires_grad_()
        expected = sequence_logps(whole, table, **how)
        expected.backward(upstream(table))
        torch.testing.assert_close(value, expected, rtol=2e-6, atol=2e-5)
        unit = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}[logits.dtype]
        torch.testing.assert_close(shard.grad, whole.grad[:, columns], rtol=unit, atol=2e-6)
        unread = whole.grad.abs().sum(-1) == 0
        assert not shard.grad[unread].any()


def check_targets_that_nobody_holds(rank):
    columns = slice(0, 9) if rank == 0 else slice(9, V)
    table = ScoreTable(logit_rows=[0, 1, 2], targets=[3, V, 12], seq_offsets=[0, 1, 3])
    value = vocab_parallel_sequence_logps(
        torch.randn(3, V)[:, columns], table, vocab_start=columns.start
    )
    assert value.isnan().tolist() == [[False, True]]


def check_nan_stays_in_its_sequence(rank):
    columns = slice(0, 9) if rank == 0 else slice(9, V)
    logits = torch.zeros(3, V)
    logits[1, 11] = math.nan  # rank 1 sees it, rank 0 must answer the same
    logits[2] = math.nan  # not scored
    table = ScoreTable(logit_rows=[0, 1, 2], targets=[3, 4, -100], seq_offsets=[0, 1, 3])
    value = vocab_parallel_sequence_logps(logits[:, columns], table, vocab_start=columns.start)
    assert value.isnan().tolist() == [[False, True]]


def check_head(rank):
    """Hidden states shared by both ranks, a head in two shards: what tensor parallelism does."""
    _, table = random_case(3, V=V, longest=5)
    rows = int(table.logit_rows.max()) + 1
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, 6, generator=generator)
    weight = torch.randn(V, 6, generator=generator)
    columns = slice(0, 9) if rank == 0 else slice(9, V)
    x, w = hidden.clone().requires_grad_(), weight[columns].clone().requires_grad_()
    logits = all_reduce_gradient(x) @ w.T
    value = vocab_parallel_sequence_logps(logits, table, vocab_start=columns.start)
    value.backward(upstream(table))
    x1, w1 = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    linear_sequence_logps(x1, w1, table).backward(upstream(table))
    torch.testing.assert_close(x.grad, x1.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(w.grad, w1.grad[columns], rtol=1e-5, atol=1e-5)


def check_context(rank):
    """Balanced as ring attention does it: rank r has chunks r and 3 - r of every row."""
    T = 8
    labels = torch.randint(0, V, (4, T), generator=torch.Generator().manual_seed(2))
    labels[:, :3] = -100
    logits = torch.randn(4, T, V, generator=torch.Generator().manual_seed(3))
    table = ScoreTable.from_labels(labels)
    chunks = torch.arange(T).chunk(4)
    positions = torch.cat([chunks[rank], chunks[3 - rank]])
    rows = (torch.arange(4)[:, None] * T + positions).flatten()
    part = context_parallel_table(table, rows)
    local = logits[:, positions].clone().requires_grad_()
    value = context_parallel_sequence_logps(local, part)
    (value * upstream(table)).sum().backward()
    whole = logits.clone().requires_grad_()
    expected = sequence_logps(whole, table)
    (expected * upstream(table)).sum().backward()
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    # the mean over ranks, as DDP makes it, of what both ranks' losses give
    torch.testing.assert_close(local.grad / 2, whole.grad[:, positions], rtol=1e-6, atol=1e-7)


def check_dtensors_are_refused(rank):
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (2,))
    table = ScoreTable(logit_rows=[0], targets=[3], seq_offsets=[0, 1, 1])
    sharded = distribute_tensor(torch.randn(2, V), mesh, [Shard(1)])
    with pytest.raises(TensorError, match="found a DTensor"):
        vocab_parallel_sequence_logps(sharded, table, vocab_start=0)
    weight = distribute_tensor(torch.randn(V, 6), mesh, [Shard(0)])
    with pytest.raises(TensorError, match="`weight` must be a plain tensor, found a DTensor"):
        linear_sequence_logps(torch.randn(2, 6), weight, table)


def check_torch_func(rank):
    """`grad` and `jacrev` give autograd's gradients; each rank takes as many collective steps."""
    labels = torch.tensor([[-100, 1, 12], [-100, 3, 10]])
    table, up = ScoreTable.from_labels(labels), torch.tensor([[1.0, -0.5]])
    generator = torch.Generator().manual_seed(4)
    hidden, weight = (torch.randn(*s, generator=generator) for s in ((2, 3, 6), (V, 6)))
    columns = slice(0, 9) if rank == 0 else slice(9, V)
    part = context_parallel_table(table, torch.arange(3) + 3 * rank)

    def vocabulary(x):
        z = all_reduce_gradient(x) @ weight[columns].T
        return vocab_parallel_sequence_logps(z, table, vocab_start=columns.start)

    def context(x):
        return context_parallel_sequence_logps(x[rank] @ weight.T, part)

    def shard(w):
        z = hidden @ w.T
        return vocab_parallel_sequence_logps(z, table, vocab_start=columns.start)

    for function, at in ((vocabulary, hidden), (context, hidden), (shard, weight[columns])):
        leaf = at.clone().requires_grad_()
        value = function(leaf)
        value.backward(up)
        assert leaf.grad.abs().sum() > 0
        got = torch.func.grad(lambda x, f=function: (f(x) * up).sum())(at)
        torch.testing.assert_close(got, leaf.grad)
        jacobian = torch.func.jacrev(function)(at)
        assert jacobian.shape == (*value.shape, *at.shape)
        torch.testing.assert_close(
            (jacobian * up.view(1, 2, *[1] * at.dim())).sum((0, 1)), leaf.grad
        )
        twice = torch.autograd.grad(
            function(leaf).sum(), leaf, torch.ones((), requires_grad=True), create_graph=True
        )
        with pytest.raises(RuntimeError, match="differentiated once"):
            twice[0].sum().backward()


CHECKS = [
    check_vocabulary,
    check_targets_that_nobody_holds,
    check_nan_stays_in_its_sequence,
    check_head,
    check_context,
    check_dtensors_are_refused,
    check_torch_func,
]


def two_ranks(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for check in CHECKS:
        torch.manual_seed(0)
        check(rank)
    dist.barrier()


@pytest.mark.slow
def test_two_processes(tmp_path):
    """All checks of this file in one pair of processes, whose start is most of the time."""
    warm.ranks(__name__, "two_ranks", tmp_path / "store")


def test_the_part_of_a_table_that_a_rank_can_score():
    table = ScoreTable(
        logit_rows=[4, 5, 6, 0],
        targets=[7, 8, -100, 9],
        seq_offsets=[0, 2, 4],
        weights=[1.0, 2.0, 3.0, 4.0],
    )
    part = context_parallel_table(table, torch.tensor([9, 5, 0]))
    assert part.targets.tolist() == [-100, 8, -100, 9]
    assert part.logit_rows[[1, 3]].tolist() == [1, 2]
    assert part.weights.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert part.lengths.tolist() == [[1, 1]]
    nothing = context_parallel_table(table, torch.zeros(0, dtype=torch.int64))
    assert not nothing.lengths.any()
    for rows in (torch.tensor([1.0]), torch.zeros(2, 2, dtype=torch.int64)):
        with pytest.raises(TensorError, match=r"`rows` must be int64 of shape \(R_local,\)"):
            context_parallel_table(table, rows)
    with pytest.raises(TensorError, match="`rows` must be on cpu"):
        context_parallel_table(table, torch.zeros(2, dtype=torch.int64, device="meta"))


def test_every_split_scores_each_token_once():
    rng = np.random.default_rng(0)
    for seed in range(20):
        logits, table = random_case(seed, longest=5)
        owner = torch.tensor(rng.integers(0, 3, len(logits)))
        total = sum(
            sequence_logps(
                logits[owner == r], context_parallel_table(table, (owner == r).nonzero()[:, 0])
            )
            for r in range(3)
        )
        torch.testing.assert_close(total, sequence_logps(logits, table), rtol=1e-6, atol=1e-6)


def test_wrong_arguments_are_refused():
    table = ScoreTable(logit_rows=[0], targets=[3], seq_offsets=[0, 1, 1])
    z = torch.zeros(2, V)
    with pytest.raises(ValueError, match="`vocab_start` must be at least 0"):
        vocab_parallel_sequence_logps(z, table, vocab_start=-1)
    with pytest.raises(TypeError, match="`vocab_start` must be an int"):
        vocab_parallel_sequence_logps(z, table, vocab_start=1.0)
    with pytest.raises(TensorError, match="`logits` must be float32, bfloat16, float16"):
        vocab_parallel_sequence_logps(z.double(), table, vocab_start=0)
    with pytest.raises(TensorError, match="`logits` must have shape"):
        vocab_parallel_sequence_logps(z[0], table, vocab_start=0)
    with pytest.raises(ValueError, match="`softcap`"):
        vocab_parallel_sequence_logps(z, table, vocab_start=0, softcap=-1.0)
    with pytest.raises(ValueError, match="process group has not been initialized"):
        vocab_parallel_sequence_logps(z, table, vocab_start=0)
