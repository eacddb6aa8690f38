"""Every loss far out: never NaN, and infinite only where its value does not fit into the dtype."""

import itertools
import math

import pytest
import torch
from loss_cases import (
    BUILT_IN,
    COUPLED,
    FINITE_UP_TO,
    LISTS,
    SCORED,
    SINGLE,
    arrays_of,
    parameters_of,
)

from dpo_ext import TensorError
from dpo_ext.torch import list_loss, preference_loss, unpaired_loss

# exponentials of log-ratios, which do not fit far out; their truth is computed below
EXPONENTIAL = sorted(FINITE_UP_TO)
NUMBERS = [0.0, -(2.0**-10), -0.5, -90.0, -1e4, -1e30]


def grid(reach, dtype):
    """All (chosen, rejected, reference of chosen, of rejected) of numbers whose differences are exact or absorbed."""
    numbers = [x for x in NUMBERS if -x <= reach]
    return torch.tensor(list(itertools.product(numbers, repeat=4)), dtype=dtype)


def answers(name, rows, params):
    """(n, 3): loss and both gradients of each row."""
    logps = rows[:, :2].clone().requires_grad_()
    lengths = torch.tensor([[1, 7]]).repeat(len(rows), 1)
    out = preference_loss(logps, rows[:, 2:], loss=name, lengths=lengths, **params)
    total = out.loss * len(rows) if name in COUPLED else out.per_pair.sum()
    (gradient,) = torch.autograd.grad(total, logps)
    return torch.cat((out.per_pair.detach()[:, None], gradient), 1)


@pytest.mark.parametrize("arrays", [False, True], ids=["numbers", "arrays"])
@pytest.mark.parametrize("reach", [1e4, 1e30])
@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in EXPONENTIAL])
def test_finite_wherever_the_value_fits(name, reach, arrays):
    found = {}
    for dtype in (torch.float64, torch.float32):
        rows = grid(reach, dtype)
        params = parameters_of(name)
        if arrays:  # the same numbers in both dtypes
            given = arrays_of(name, len(rows))
            params = {k: v.to(dtype) if torch.is_tensor(v) else v for k, v in given.items()}
        found[dtype] = answers(name, rows, {} if arrays and name in COUPLED else params).double()
    exact, single = found[torch.float64], found[torch.float32]
    assert exact.isfinite().all()
    assert not single.isnan().any()
    fits = exact.abs() < 3e38
    assert single[fits].isfinite().all()
    assert (single[~fits].sign() == exact[~fits].sign()).all()
    if reach == 1e4 and name != "orpo":  # its guard at an average of 0 is an ulp of the dtype
        error = (single - exact).abs() / (1 + exact.abs())
        assert error[fits].max() <= 5e-5  # float32 holds 1e4 to 5e-4, and beta is 0.1


def truth_of(name, params, row):
    """Loss and gradients with 60 digits, from the formulas of the catalogue."""
    mpmath = pytest.importorskip("mpmath")
    mp = mpmath.mp
    c, r, cr, rr = (mp.mpf(x) for x in row)
    p = {k: mp.mpf(v) for k, v in params.items()}
    xw, xl, nw, nl = c - cr, r - rr, 1, 7

    def s(z):
        return 1 / (1 + mp.exp(-z))

    if name == "bpo_sba":
        m, lam = p["beta"] * (xw - xl), p["lam"]
        down, up = mp.exp(-(lam + 1) * m), mp.exp(lam * m)
        slope = -p["beta"] * (down + up) / 4
        return (lam * down - (lam + 1) * up) / (4 * lam * (lam + 1)), slope, -slope
    beta = p["beta"]
    if name == "chipo":
        v = beta * ((mp.exp(xw) + xw) - (mp.exp(xl) + xl))
        u, inside = min(max(v, -p["clip2r"]), p["clip2r"]), abs(v) < p["clip2r"]
        uc, ur = inside * beta * (1 + mp.exp(xw)), -inside * beta * (1 + mp.exp(xl))
    elif name == "alphapo":
        alpha, cn, rn = p["alpha"], c / nw, r / nl
        u = beta / alpha * (mp.exp(-alpha * rn) - mp.exp(-alpha * cn)) - p["gamma"]
        uc, ur = beta / nw * mp.exp(-alpha * cn), -beta / nl * mp.exp(-alpha * rn)
    else:
        alpha = p.get("alpha", mp.mpf(1))
        u = beta / alpha * (mp.exp(-alpha * xl) - mp.exp(-alpha * xw))
        uc, ur = beta * mp.exp(-alpha * xw), -beta * mp.exp(-alpha * xl)
    loss = mp.log1p(mp.exp(-u)) if u > 0 else -u + mp.log1p(mp.exp(u))
    return loss, -s(-u) * uc, -s(-u) * ur


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", EXPONENTIAL)
def test_exponentials_are_infinite_only_beyond_the_dtype(name, dtype):
    params = parameters_of(name)
    rows = grid(1e4, dtype)
    got = answers_one_by_one(name, rows, params)
    largest = torch.finfo(dtype).max
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(60):
        for row, ours in zip(rows.tolist(), got.tolist(), strict=True):
            for value, want in zip(ours, truth_of(name, params, row), strict=True):
                if abs(want) > 0.5 * largest:  # a product of factors may overflow a little early
                    assert value == math.copysign(math.inf, want) or abs(value) > 0.4 * largest
                else:
                    # float32 rounds an exponent of 90 by 4e-6, and log-ratios of 1e4 by 5e-4
                    slack = 1e-9 if dtype == torch.float64 else 2e-3
                    assert abs(value - want) <= slack * (1 + abs(want)), (row, value, float(want))


def answers_one_by_one(name, rows, params):
    """As `answers`; the sum of a batch may be +inf - inf, which is an error."""
    return torch.cat([answers(name, row[None], params) for row in rows])


def test_infinities_of_both_signs_are_told_as_that():
    logps = torch.tensor([[-9e4, 0.0], [0.0, -9e4]])
    with pytest.raises(TensorError, match=r"some are \+inf and some -inf"):
        preference_loss(logps, torch.zeros(2, 2), loss="bpo_sba")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", SINGLE)
def test_single_completions_stay_finite(name, dtype):
    rows = grid(1e30, dtype)[:, :2]
    params = {"kto": {"z": 0.5}, "bco": {"delta": 0.1}}.get(name, {})
    for label in (0, 1):
        logps = rows[:, 0].clone().requires_grad_()
        labels = torch.full((len(rows),), label)
        out = unpaired_loss(logps, rows[:, 1], labels, loss=name, **params)
        (gradient,) = torch.autograd.grad(out.per_example.sum(), logps)
        assert out.per_example.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", LISTS)
def test_lists_stay_finite(name, dtype):
    numbers = [-x for x in NUMBERS] + [x for x in NUMBERS if x]
    rows = torch.tensor(list(itertools.product(numbers, repeat=3)), dtype=dtype)
    scores = {"scores": rows.flip(1)} if name in SCORED else {}
    for counts in (None, torch.full((len(rows),), 2)):
        logps = rows.clone().requires_grad_()
        out = list_loss(logps, torch.zeros_like(rows), loss=name, counts=counts, **scores)
        (gradient,) = torch.autograd.grad(out.per_example.sum(), logps)
        assert out.per_example.isfinite().all()
        assert gradient.isfinite().all()
        if counts is not None:
            assert (gradient[:, 2] == 0).all()
