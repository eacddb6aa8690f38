"""Losses whose batch is spread over ranks: the batch's number and gradient, or a refusal, in two processes."""

import re

import pytest
import torch
import torch.distributed as dist
import warm
from torch.nn.parallel import DistributedDataParallel

from dpo_ext import TensorError
from dpo_ext.torch import (
    RunningMean,
    ScoreTable,
    kto_z,
    linear_preference_loss,
    preference_loss,
    register_loss,
    unpaired_loss,
)
from dpo_ext.torch.losses.ranks import check_group
from dpo_ext.torch.losses.registry import LOSSES

COUPLED = sorted(name for name, row in LOSSES.items() if row.couples_batch)
PARTS = (slice(0, 3), slice(3, 8))  # unequal on purpose
SHARES = {0: slice(0, 0), 1: slice(0, 8)}  # rank 0 has nothing


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    logps = -torch.rand(8, 2, generator=generator, dtype=torch.float64) * 40
    ref = logps + torch.randn(8, 2, generator=generator, dtype=torch.float64) * 3
    return (
        logps.to(dtype),
        ref.to(dtype),
        torch.randint(1, 30, (8, 2), generator=generator),
    )


def value_and_gradient(part, loss, dtype=torch.float64, **options):
    logps, ref, lengths = (t[part] for t in batch(dtype))
    logps.requires_grad_()
    out = preference_loss(logps, ref, loss=loss, lengths=lengths, **options)
    (gradient,) = torch.autograd.grad(out.loss, logps)
    return out.loss.detach(), gradient, out


def summed(value):
    total = value.clone()
    dist.all_reduce(total)
    return total


def exponential_tilt(logps, ref_logps):
    """Dr. DPO with a temperature of 1, as a user would write it."""
    ratios = logps - ref_logps
    m = 0.1 * (ratios[:, 0] - ratios[:, 1])
    return -torch.logsumexp(torch.nn.functional.logsigmoid(m), 0) + torch.log(
        torch.tensor(float(len(m)), dtype=m.dtype)
    )


def centred(logps, ref_logps, scale):
    ratios = logps - ref_logps
    m = scale * (ratios[:, 0] - ratios[:, 1])
    return (m - m.mean() - 1) ** 2


def check_gathered(rank):
    """The ranks' losses add up to the batch's, and each rank has its own rows of the gradient."""
    register_loss("tilt_of_this_test", exponential_tilt, couples_batch=True)
    register_loss("centred_of_this_test", centred, parameters={"scale": 0.1}, couples_batch=True)
    losses = [*COUPLED, "tilt_of_this_test", "centred_of_this_test", "dpo", "simpo"]
    losses += [["dpo", "aot_paired"], ["sft_token_mean", "dr_dpo", "ipo_sum"]]
    for loss in losses:
        for parts in (PARTS, SHARES):
            mine = parts[rank]
            want, whole, out = value_and_gradient(slice(0, 8), loss, group="local")
            got, gradient, own = value_and_gradient(mine, loss, group=dist.group.WORLD)
            torch.testing.assert_close(summed(got), want, rtol=1e-12, atol=1e-12, msg=str(loss))
            torch.testing.assert_close(gradient, whole[mine], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(own.per_pair.detach(), out.per_pair.detach()[mine])
            assert len(own.chosen_rewards) == len(gradient)
    single, gradient, _ = value_and_gradient(
        PARTS[rank], "aot_unpaired", torch.float32, group=dist.group.WORLD
    )
    assert single.dtype == gradient.dtype == torch.float32
    scale = torch.full((len(batch()[0][PARTS[rank]]),), 0.1, dtype=torch.float64)
    with pytest.raises(ValueError, match="`scale` must be one number where `group` gathers"):
        value_and_gradient(PARTS[rank], "centred_of_this_test", group=dist.group.WORLD, scale=scale)


def check_refused(rank):
    """Without a word about the ranks a loss of the batch is an error, never the loss of a part."""
    mine = PARTS[rank]
    for loss in [*COUPLED, ["dpo", "aot_paired"], "tilt_of_this_test"]:
        for options in ({}, {"compat": "paper"} if loss == "aot_paired" else {}):
            with pytest.raises(
                ValueError, match=r"couples the batch, and there are 2 ranks: `group`"
            ):
                value_and_gradient(mine, loss, **options)
    with pytest.raises(ValueError, match="`kto_z` is a mean over the batch, and there are 2 ranks"):
        kto_z(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="`RunningMean` is a mean over the batch"):
        RunningMean().update(torch.zeros(2))
    value_and_gradient(mine, "dpo")  # a loss of pairs asks nothing


def check_local(rank):
    """Each rank's pairs a batch of their own: when asked for, and in TRL, which computes that."""
    mine = PARTS[rank]
    logps, ref, _ = (t[mine] for t in batch())
    u, v = ((t[:, 0] - t[:, 1]).sort().values for t in (logps, ref))
    want = -torch.nn.functional.logsigmoid(0.1 * (u - v)).mean()
    for options in (
        {"loss": "aot_paired", "group": "local"},
        {"loss": "aot", "compat": "trl-1.16"},
    ):
        torch.testing.assert_close(value_and_gradient(mine, **options)[0], want)
    assert abs(want - value_and_gradient(slice(0, 8), "aot_paired", group="local")[0]) > 1e-4


def check_shared_numbers(rank):
    """KTO's z and BCO's running mean are those of all ranks' examples."""
    x = torch.tensor([1.0, 2.0, 6.0, 0.5, -1.0, 3.0, 9.0, 1.5])
    group = dist.group.WORLD
    assert kto_z(x[PARTS[rank]], torch.zeros(8)[PARTS[rank]], group=group) == x.mean()
    assert kto_z(-x[PARTS[rank]], torch.zeros(8)[PARTS[rank]], group=group) == 0
    own = x[PARTS[rank]].mean()
    assert kto_z(x[PARTS[rank]], torch.zeros(8)[PARTS[rank]], group="local") == own
    delta = RunningMean(group)
    assert delta.update(x[PARTS[rank]]) == x.mean()
    assert delta.update(x[SHARES[rank]] + 2) == x.mean() + 1  # a rank may have none


def check_single_completions(rank):
    """Losses of the ranks add up to the batch's, and the metrics of all ranks are the batch's."""
    logps, ref = torch.linspace(-9, -2, 8), torch.full((8,), -5.0)
    labels = torch.arange(8) % 3 == 0
    whole = unpaired_loss(logps, ref, labels, z=0.25)
    want = whole.metrics
    for parts in (PARTS, SHARES):  # a rank may have none
        mine = parts[rank]
        own = unpaired_loss(logps[mine], ref[mine], labels[mine], z=0.25, num_examples=8)
        torch.testing.assert_close(summed(own.loss), whole.loss)
        got = own.metrics_over(dist.group.WORLD)
        assert got.keys() == want.keys()
        for name, value in got.items():
            torch.testing.assert_close(value, want[name])
    with pytest.raises(ValueError, match="`metrics_over` is a mean over the batch"):
        whole.metrics_over()


def check_through_ddp(rank):
    """DDP averages gradients over ranks: twice the loss gives those of the batch."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 2, dtype=torch.float64)
    inputs = torch.randn(8, 4, dtype=torch.float64)
    _, ref, _ = batch()

    def loss(model, part, **options):
        logps = -model(inputs[part]).exp()
        return preference_loss(logps, ref[part] / 20, loss="aot_unpaired", **options).loss

    want = torch.autograd.grad(loss(layer, slice(0, 8), group="local"), list(layer.parameters()))
    wrapped = DistributedDataParallel(layer)
    (2 * loss(wrapped, PARTS[rank], group=dist.group.WORLD)).backward()
    for parameter, gradient in zip(layer.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


def check_from_hidden_states(rank):
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(8, 4, generator=generator)
    weight = torch.randn(7, 4, generator=generator, requires_grad=True)
    own = hidden[4 * rank : 4 * rank + 4]
    table = ScoreTable(logit_rows=[0, 1, 2, 3], targets=[1, 2, 3, 4], seq_offsets=[0, 1, 2, 3, 4])
    ref = -torch.ones(2, 2)
    with pytest.raises(ValueError, match="there are 2 ranks: `group`"):
        linear_preference_loss(own, weight, table, ref, loss="aot_paired")
    got = linear_preference_loss(
        own, weight, table, ref, loss="aot_paired", group=dist.group.WORLD
    ).loss
    got.backward()
    whole = ScoreTable(logit_rows=range(8), targets=[1, 2, 3, 4] * 2, seq_offsets=range(9))
    leaf = weight.detach().requires_grad_()
    want = linear_preference_loss(
        hidden, leaf, whole, -torch.ones(4, 2), loss="aot_paired", group="local"
    ).loss
    want.backward()
    torch.testing.assert_close(summed(got.detach()), want.detach())
    torch.testing.assert_close(summed(weight.grad), leaf.grad)
    weight.grad = (
        None  # a loss of pairs, whose chunks are made in the forward pass: rank 1 has one pair
    )
    few = slice(0, 4) if rank == 0 else slice(0, 2)
    small = (
        table if rank == 0 else ScoreTable(logit_rows=[0, 1], targets=[1, 2], seq_offsets=[0, 1, 2])
    )
    own_ref = -torch.ones(small.n_groups, 2)
    got = linear_preference_loss(own[few], weight, small, own_ref, group=dist.group.WORLD).loss
    got.backward()
    rows = [0, 1, 2, 3, 4, 5]
    three = ScoreTable(logit_rows=rows, targets=[1, 2, 3, 4, 1, 2], seq_offsets=range(7))
    leaf = weight.detach().requires_grad_()
    want = linear_preference_loss(hidden, leaf, three, -torch.ones(3, 2)).loss
    want.backward()
    torch.testing.assert_close(summed(got.detach()), want.detach())
    torch.testing.assert_close(summed(weight.grad), leaf.grad)
    with pytest.raises(ValueError, match="`num_pairs` and `group` both say"):
        linear_preference_loss(own, weight, table, ref, group=dist.group.WORLD, num_pairs=3)


def check_groups(rank):
    first = dist.new_group([0])
    if rank == 1:
        with pytest.raises(ValueError, match="`group` must hold this rank"):
            value_and_gradient(slice(0, 8), "aot_paired", group=first)
    else:
        want = value_and_gradient(slice(0, 8), "aot_paired", group="local")[0]
        assert value_and_gradient(slice(0, 8), "aot_paired", group=first)[0] == want
    with pytest.raises(ValueError, match="`num_pairs` and `group` both say"):
        value_and_gradient(slice(0, 8), "dpo", group=dist.group.WORLD, num_pairs=8)
    with pytest.raises(ValueError, match="returns a scalar: `weight`, `num_pairs` and `group`"):
        preference_loss(*batch()[:2], loss=exponential_tilt, group=dist.group.WORLD)


CHECKS = [
    check_gathered,
    check_refused,
    check_local,
    check_shared_numbers,
    check_single_completions,
    check_through_ddp,
    check_from_hidden_states,
    check_groups,
]


def two_ranks(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for check in CHECKS:
        check(rank)
    dist.barrier()


@pytest.mark.slow
def test_two_processes(tmp_path):
    """All checks of this file in one pair of processes, whose start is most of the time."""
    warm.ranks(__name__, "two_ranks", tmp_path / "store")


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("option", [{"num_pairs": 8}, {"weight": 1.0}], ids=["num_pairs", "weight"])
def test_a_part_of_a_batch_is_refused(name, option):
    """Gradient accumulation: no factor makes the losses of two halves the loss of the whole."""
    logps, ref, lengths = batch()
    (parameter,) = option
    for loss in (name, ["dpo", name]):
        with pytest.raises(ValueError, match=f"couples the batch: it does not take `{parameter}`"):
            preference_loss(logps, ref, loss=loss, lengths=lengths, **option)


def test_a_registered_loss_of_the_batch_refuses_parts_as_well():
    register_loss("centred_here", centred, parameters={"scale": 0.1}, couples_batch=True)
    try:
        with pytest.raises(ValueError, match="couples the batch: it does not take `num_pairs`"):
            preference_loss(*batch()[:2], loss="centred_here", num_pairs=8)
        out = preference_loss(*batch()[:2], loss="centred_here")
        assert not out.per_pair.requires_grad
        torch.testing.assert_close(out.loss, centred(*batch()[:2], 0.1).mean())
    finally:
        del LOSSES["centred_here"]


def test_without_ranks_a_group_is_what_it_says():
    assert check_group(None) is None
    assert check_group("local") is None
    for group in ("all", 3):
        with pytest.raises(
            TypeError, match=re.escape('`group` must be a process group or "local"')
        ):
            preference_loss(*batch()[:2], group=group)
    with pytest.raises(TensorError, match="`rewards` must hold at least one"):
        RunningMean().update(torch.zeros(0))
