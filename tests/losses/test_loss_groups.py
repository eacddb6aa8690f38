"""Losses of single completions and of lists, against the golden file and their definitions."""

import json
import math
import re

import numpy as np
import places
import pytest
import torch

from dpo_ext import TensorError
from dpo_ext.torch.losses.lists import LISTWISE, list_loss
from dpo_ext.torch.losses.single import UNPAIRED, RunningMean, kto_z, unpaired_loss

GOLDEN = json.loads((places.GOLDEN / "golden_losses.json").read_text())["structured"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def close(got, want, tolerance):
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    error = np.abs(got - want) / (1 + np.abs(want))
    assert error.max() <= tolerance, (int(error.argmax()), error.max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["kto", "bco", "apo_zero_unpaired"])
def test_unpaired_losses_are_the_golden_ones(name, dtype):
    golden = GOLDEN[name]
    x = torch.tensor(golden["x"], dtype=dtype)
    for k in golden["sets"]:
        given = k["params"]
        params = {"kto": {"z": given["z_or_delta"], "lam_d": given["lam_d"], "lam_u": given["lam_u"]},
                  "bco": {"delta": given["z_or_delta"]}}.get(name, {})  # fmt: skip
        logps = x.clone().requires_grad_()
        out = unpaired_loss(
            logps,
            torch.zeros_like(x),
            torch.tensor(golden["label"]),
            loss=name,
            beta=given["beta"],
            **params,
        )
        (gradient,) = torch.autograd.grad(out.per_example.sum(), logps, retain_graph=True)
        (of_mean,) = torch.autograd.grad(out.loss, logps)
        close(out.per_example.detach(), k["loss"], TOLERANCE[dtype])
        close(gradient, k["d_logp"], TOLERANCE[dtype])
        close(of_mean * len(x), gradient, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["plackett_luce", "s_dpo", "infonca", "nca"])
def test_list_losses_are_the_golden_ones_padded_or_alone(name, dtype):
    lists = GOLDEN["listwise"]["lists"]
    K = max(len(x["logp"]) for x in lists)
    counts = torch.tensor([len(x["logp"]) for x in lists])

    def padded(key, fill):
        return torch.tensor([x[key] + [fill] * (K - len(x[key])) for x in lists], dtype=dtype)

    for k in GOLDEN["listwise"][name]["sets"]:
        beta, alpha = k["params"]["beta"], k["params"]["alpha"]
        scored = name in ("infonca", "nca")
        options = {"loss": name, "beta": beta, **({"alpha": alpha} if scored else {})}
        for fill in (0.0, math.nan):  # what pads a list is not read
            logps = padded("logp", fill).requires_grad_()
            scores = padded("score", fill) if scored else None
            out = list_loss(logps, padded("ref", fill), scores, counts=counts, **options)
            (gradient,) = torch.autograd.grad(out.per_example.sum(), logps)
            close(out.per_example.detach(), k["loss"], TOLERANCE[dtype])
            for i, want in enumerate(k["d_logp"]):
                close(gradient[i, : len(want)], want, TOLERANCE[dtype])
                assert (gradient[i, len(want) :] == 0).all()
        first = torch.tensor([lists[0]["logp"]], dtype=dtype)
        ref = torch.tensor([lists[0]["ref"]], dtype=dtype)
        alone = list_loss(
            first, ref, torch.tensor([lists[0]["score"]]) if scored else None, **options
        )
        close(alone.loss, k["loss"][0], TOLERANCE[dtype])


def test_a_list_of_two_is_a_pair():
    from dpo_ext.torch import preference_loss

    logps, ref = -torch.rand(5, 2).double() * 50, -torch.rand(5, 2).double() * 50
    want = preference_loss(logps, ref, beta=0.3).loss
    for name in ("plackett_luce", "s_dpo"):
        close(list_loss(logps, ref, loss=name, beta=0.3).loss, want, 1e-12)


def test_kto_at_its_own_z_is_the_pair_loss_split():
    from dpo_ext.torch import preference_loss

    logps, ref = -torch.rand(5, 2).double() * 50, -torch.rand(5, 2).double() * 50
    pair = preference_loss(logps, ref, loss="kto_pair_z", z=0.7).loss
    flat = unpaired_loss(
        logps.reshape(-1), ref.reshape(-1), torch.tensor([1, 0] * 5), z=0.7, num_examples=5
    )
    close(flat.loss, pair, 1e-12)


def test_weights_and_counts_of_the_step():
    logps, ref = torch.tensor([-3.0, math.nan, -2.0]), torch.tensor([-4.0, -1.0, -2.0])
    labels = torch.tensor([True, False, True])
    out = unpaired_loss(
        logps, ref, labels, loss="apo_zero_unpaired", weight=[1.0, 0.0, 2.0], num_examples=10
    )
    want = (torch.sigmoid(torch.tensor(-0.1)) + 2 * 0.5) / 10
    close(out.loss, want, 1e-6)


def test_the_running_mean_and_z():
    delta = RunningMean()
    for step, want in (([2.0], 2.0), ([0.0, 2.0], 1.5), ([3.0], 2.0)):
        assert delta.update(torch.tensor(step)) == want
    assert kto_z(torch.tensor([-9.0]), torch.tensor([-1.0])) == 0


ONE, TWO = torch.zeros(3) - 1, torch.zeros(3, 2) - 1


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: unpaired_loss(TWO, TWO, torch.ones(3)), TensorError, "of shape (N,), found float32 of shape (3, 2)"),
        (lambda: unpaired_loss(ONE, ONE.double(), torch.ones(3)), TensorError, "the reference's `logps` must be float32"),
        (lambda: unpaired_loss(ONE, ONE, torch.ones(2), z=0.0), TensorError, "`labels` must be of shape (3,)"),
        (lambda: unpaired_loss(ONE, ONE, torch.full((3,), 2), z=0.0), TensorError, "`labels` must be 0 or 1"),
        (lambda: unpaired_loss(ONE, ONE, torch.ones(3)), ValueError, "loss 'kto' needs `z`"),
        (lambda: unpaired_loss(ONE, ONE, torch.ones(3), loss="bco", z=1.0), ValueError, "needs `delta`"),
        (lambda: unpaired_loss(ONE, ONE, torch.ones(3), loss="dpo"), ValueError, "must be one of 'kto', 'bco'"),
        (lambda: unpaired_loss(ONE * math.nan, ONE, torch.ones(3), z=0.0), TensorError, "example 0: the loss is NaN"),
        (lambda: list_loss(ONE, ONE), TensorError, "of shape (N, K)"),
        (lambda: list_loss(TWO[:, :1], TWO[:, :1]), TensorError, "at least 2 completions"),
        (lambda: list_loss(TWO, TWO, loss="nca"), TensorError, "`scores` is missing"),
        (lambda: list_loss(TWO, TWO, TWO), TensorError, "`scores` is not read"),
        (lambda: list_loss(TWO, TWO, counts=torch.tensor([1, 2, 2])), TensorError, "`counts` must be in 2..2"),
        (lambda: list_loss(TWO, TWO, alpha=1.0), ValueError, "has no parameter `alpha`"),
        (lambda: list_loss(TWO, TWO.clone().requires_grad_()), TensorError, "asks for a gradient"),
    ],
)  # fmt: skip
def test_bad_input_is_a_typed_error(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()


def test_the_number_that_is_wrong_is_called_by_its_name():
    with pytest.raises(ValueError, match="`num_examples` must be > 0, found 0"):
        unpaired_loss(ONE, ONE, torch.ones(3), z=0.0, num_examples=0)
    with pytest.raises(TensorError, match="`num_lists` must be one number"):
        list_loss(TWO, TWO, num_lists=torch.ones(2))


@pytest.mark.parametrize(
    "loss",
    [
        lambda logps: unpaired_loss(logps[:, 0], TWO[:, 0], torch.ones(3), z=0.3),
        lambda logps: list_loss(logps, TWO),
    ],
    ids=["single", "list"],
)
def test_a_gradient_is_made_with_a_graph_and_its_own_gradient_is_refused(loss):
    logps = (TWO * torch.tensor([1.0, 2.0])).requires_grad_()
    (want,) = torch.autograd.grad(loss(logps).loss, logps)
    (gradient,) = torch.autograd.grad(loss(logps).loss, logps, create_graph=True)
    assert torch.equal(gradient.detach(), want)
    with pytest.raises(RuntimeError, match="differentiated once, not twice\nhint: pass a function"):
        gradient.sum().backward()


def test_all_structured_losses_of_the_golden_file_are_somewhere():
    from dpo_ext.torch.losses.registry import LOSSES

    names = set(GOLDEN) - {"listwise"} | set(GOLDEN["listwise"]) - {
        "lists",
        "formulas",
        "provenance",
    }
    assert len(names) == 11
    assert names <= set(UNPAIRED) | set(LISTWISE) | set(LOSSES)
