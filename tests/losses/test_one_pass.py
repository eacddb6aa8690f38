"""DPO on the CPU is one call of Rust: what its formula computes, to the last rounding, and for those inputs alone that
the call can be given.
"""

import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_ext.torch import preference_loss
from dpo_ext.torch.losses import registry
from dpo_ext.torch.losses.result import METRICS

DTYPES = (torch.float32, torch.float64)
ROW = registry.LOSSES["dpo"]
OPTIONS = [
    {},
    {"beta": 0.7},
    {"beta": 2.0, "margin": -1.5},
    {"label_smoothing": 0.2, "margin": 3.0},
]


def drawn(dtype, pairs=65, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ref = torch.randn(pairs, 2, generator=generator, dtype=torch.float64) * 40 - 300
    scale = torch.tensor([0.1, 3.0, 50.0, 900.0])[torch.arange(pairs) % 4, None]
    logps = ref + torch.randn(pairs, 2, generator=generator, dtype=torch.float64) * scale
    return logps.to(dtype), ref.to(dtype)


@pytest.fixture
def without_one_pass(monkeypatch):
    monkeypatch.setitem(registry.LOSSES, "dpo", dataclasses.replace(ROW, on_cpu=None))


@pytest.fixture
def without_formula(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the formula was asked")

    monkeypatch.setitem(registry.LOSSES, "dpo", dataclasses.replace(ROW, formula=refuse))


def computed(logps, ref_logps, **options):
    logps = logps.clone().requires_grad_()
    out = preference_loss(logps, ref_logps, **options)
    out.loss.backward()
    return (
        out.loss.detach(),
        out.per_pair.detach(),
        logps.grad,
        torch.stack([*out.metrics.values()]),
    )


def exact(logps, ref_logps, beta=0.1, margin=0.0, label_smoothing=0.0, weight=None):
    """By autograd in float64, of the numbers as they were rounded."""
    dtype, logps, ref = logps.dtype, logps.double().requires_grad_(), ref_logps.double()
    u = beta * ((logps[:, 0] - ref[:, 0]) - (logps[:, 1] - ref[:, 1])) - margin
    per_pair = -torch.nn.functional.logsigmoid(u) + label_smoothing * u
    loss = (per_pair if weight is None else weight.double() * per_pair).mean()
    loss.backward()
    up, down = (beta * (logps - ref)).detach().to(dtype).double().unbind(1)
    columns = (up, down, (up > down).double(), up - down, *logps.detach().unbind(1))
    means = torch.stack([column.mean() for column in columns])
    return (value.detach().to(dtype) for value in (loss, per_pair, logps.grad, means))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_formula_in_float64_rounded_once(dtype, options, without_formula):
    logps, ref = drawn(dtype)
    ulps = (
        {"rtol": 3e-7, "atol": 1e-44} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-300}
    )
    for found, expected in zip(
        computed(logps, ref, **options), exact(logps, ref, **options), strict=True
    ):
        assert found.dtype == dtype
        assert_close(found, expected, **ulps)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_row_s_own_formula(dtype, options, request):
    logps, ref = drawn(dtype)
    ours = computed(logps, ref, **options)
    request.getfixturevalue("without_one_pass")
    rtol = 2e-5 if dtype == torch.float32 else 1e-11
    for found, expected in zip(ours, computed(logps, ref, **options), strict=True):
        assert_close(found, expected, rtol=rtol, atol=1e-6)


def test_extreme_log_ratios_are_what_the_equation_makes_of_them(without_formula):
    inf = math.inf
    logps = torch.tensor([[-inf, -2.0], [-2.0, -inf], [0.0, -3e38], [-3e38, 3e38], [-1e30, -1e30]])
    logps.requires_grad_()
    per_pair = preference_loss(logps, torch.zeros(5, 2)).per_pair
    (grad,) = torch.autograd.grad(per_pair.sum(), logps)
    assert_close(per_pair, torch.tensor([inf, 0.0, 0.0, 6e37, math.log(2)]))
    slopes = torch.tensor([0.1, 0.0, 0.0, 0.1, 0.05])
    assert_close(grad, torch.stack((-slopes, slopes), 1))


def test_weights_and_a_count_are_those_of_the_formula(request):
    logps, ref = drawn(torch.float32)
    weight = torch.rand(65)
    weight[3] = 0
    logps[3] = math.nan
    ours = computed(logps, ref, weight=weight, num_pairs=100)
    assert torch.equal(ours[2][3], torch.zeros(2))
    request.getfixturevalue("without_one_pass")
    formula = computed(logps, ref, weight=weight, num_pairs=100)
    assert_close(ours[0], formula[0], rtol=1e-5, atol=0)
    assert_close(ours[2], formula[2], rtol=1e-5, atol=1e-8)


def test_what_the_call_cannot_be_given_goes_to_the_formula(without_formula):
    logps, ref = drawn(torch.float32)
    for options in ({"beta": torch.full((65,), 0.1)}, {"margin": torch.zeros(65)}):
        with pytest.raises(AssertionError, match="the formula was asked"):
            preference_loss(logps, ref, **options)

    class Watched(torch.Tensor):
        pass

    for given in ((logps.as_subclass(Watched), ref), (logps, ref.as_subclass(Watched))):
        with pytest.raises(AssertionError, match="the formula was asked"):
            preference_loss(*given)


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", DTYPES)
def test_whoever_watches_the_call_sees_the_same_bits(dtype, without_formula):
    logps, ref = drawn(dtype)
    alone = computed(logps, ref)[:3]
    with Watching() as watching:
        watched = computed(logps, ref)[:3]
    assert "dpo_ext.dpo_loss.default" in watching.seen
    with torch.profiler.profile() as profile:
        profiled = computed(logps, ref)[:3]
    assert "dpo_ext::dpo_loss" in {event.name for event in profile.events()}
    for found in (watched, profiled):
        assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))


def test_the_operator_keeps_what_it_promises():
    logps, ref = drawn(torch.float32)
    torch.library.opcheck(torch.ops.dpo_ext.dpo_loss.default, (logps, ref, 0.1, 0.0, 0.0))


def test_memory_with_gaps_is_read_in_its_order(without_formula):
    logps, ref = drawn(torch.float64)
    wide = torch.full((65, 5), math.nan, dtype=torch.float64)
    wide[:, 1:4:2] = logps
    found = preference_loss(wide[:, 1:4:2], ref.t().contiguous().t()).per_pair
    assert torch.equal(found, preference_loss(logps, ref).per_pair)


@pytest.mark.parametrize("pairs", [0, 1, 7, 1000])
def test_metrics_are_means_of_what_the_rewards_say(pairs):
    logps, ref = drawn(torch.float32, pairs=pairs)
    out = preference_loss(logps, ref, beta=0.3)
    chosen, rejected = out.chosen_rewards, out.rejected_rewards
    columns = (chosen, rejected, (chosen > rejected).float(), chosen - rejected, *logps.unbind(1))
    assert tuple(out.metrics) == METRICS
    for found, column in zip(out.metrics.values(), columns, strict=True):
        assert_close(found, column.double().sum().div(max(pairs, 1)).float(), rtol=1e-5, atol=1e-5)
