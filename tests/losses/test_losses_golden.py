"""Every loss of the table against the golden file: values and both gradients, in float64 and
float32.
"""

import json
import math

import numpy as np
import places
import pytest
import torch

from dpo_ext.torch import preference_loss
from dpo_ext.torch.losses.registry import LOSSES

GOLDEN = json.loads((places.GOLDEN / "golden_losses.json").read_text())
ROWS = GOLDEN["rows"]
COLUMNS = np.array([row[:6] for row in ROWS])
CASES = [(name, k) for name, loss in GOLDEN["losses"].items() for k in range(len(loss["sets"]))]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
# beyond float32's range, hence infinite: (name, set) -> what overflows in row 46
OVERFLOWS = {("fdpo_forward_kl", 0), ("fdpo_forward_kl", 1), ("fdpo_alpha", 0)}


def golden_inputs(dtype):
    columns = torch.tensor(COLUMNS)
    return columns[:, :2].to(dtype), columns[:, 2:4].to(dtype), columns[:, 4:6].long()


def mixed_error(got, want):
    return np.abs(got - want) / (1 + np.abs(want))


def compare(got, want, case, dtype, rows_that_overflow=()):
    got, want = np.asarray(got, dtype=np.float64), np.array(want, dtype=np.float64)
    for row in rows_that_overflow:
        assert np.isinf(got[row])
        assert np.sign(got[row]) == np.sign(want[row])
        got[row] = want[row] = 0
    error = mixed_error(got, want)
    worst = int(np.argmax(np.where(np.isnan(error), np.inf, error)))
    assert error[worst] <= TOLERANCE[dtype], (
        f"{case} row {worst} ({ROWS[worst][6]}): {got[worst]!r} for {want[worst]!r}, error {error[worst]:.2e}"
    )


def test_the_golden_file_has_46_losses_and_the_table_has_them_all():
    assert len(GOLDEN["losses"]) == 46
    assert set(GOLDEN["losses"]) <= set(LOSSES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "k"), CASES, ids=lambda x: str(x))
def test_values_and_gradients_are_the_golden_ones(name, k, dtype):
    golden = GOLDEN["losses"][name]["sets"][k]
    logps, ref_logps, lengths = golden_inputs(dtype)
    logps.requires_grad_()
    ref = ref_logps if GOLDEN["losses"][name]["uses_reference"] else None
    out = preference_loss(logps, ref, loss=name, lengths=lengths, **golden["params"])
    assert out.per_pair.dtype == dtype
    assert out.loss.dtype == dtype
    over = (46,) if dtype == torch.float32 and (name, k) in OVERFLOWS else ()
    compare(out.per_pair.detach(), golden["loss"], (name, k, "loss"), dtype, over)
    # a random upstream for each pair, powers of two so that it adds no rounding
    upstream = 2.0 ** torch.randint(
        -2, 3, (len(ROWS),), generator=torch.Generator().manual_seed(k)
    ).to(dtype)
    (gradient,) = torch.autograd.grad(out.per_pair, logps, upstream, retain_graph=True)
    gradient = gradient / upstream[:, None]
    compare(gradient[:, 0], golden["d_chosen"], (name, k, "d_chosen"), dtype, over)
    compare(gradient[:, 1], golden["d_rejected"], (name, k, "d_rejected"), dtype)


@pytest.mark.parametrize("name", sorted(GOLDEN["losses"]))
def test_the_batch_loss_is_the_weighted_mean_and_so_is_its_gradient(name):
    golden = GOLDEN["losses"][name]["sets"][0]
    logps, ref_logps, lengths = golden_inputs(torch.float64)
    logps.requires_grad_()
    weight = torch.rand(len(ROWS), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[3] = 0
    for given, divisor in ((None, len(ROWS)), (177, 177)):
        out = preference_loss(
            logps,
            ref_logps,
            loss=name,
            lengths=lengths,
            weight=weight,
            num_pairs=given,
            **golden["params"],
        )
        want = math.fsum((weight.numpy() * np.array(golden["loss"])).tolist()) / divisor
        assert abs(out.loss.item() - want) <= 1e-12 * (1 + abs(want))
        (gradient,) = torch.autograd.grad(3.0 * out.loss, logps)
        for side, key in enumerate(("d_chosen", "d_rejected")):
            want_gradient = 3.0 * weight.numpy() * np.array(golden[key]) / divisor
            assert mixed_error(gradient[:, side].numpy(), want_gradient).max() <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["aot_paired", "aot_unpaired", "dr_dpo"])
def test_losses_that_couple_the_batch_are_the_golden_ones(name, dtype):
    for golden in GOLDEN["structured"][name]["sets"]:
        for batch in golden["batches"]:
            logps, ref_logps, _ = (t[batch["rows"]] for t in golden_inputs(dtype))
            logps.requires_grad_()
            out = preference_loss(logps, ref_logps, loss=name, **golden["params"])
            (gradient,) = torch.autograd.grad(2.0 * out.loss, logps)
            case = (name, batch["rows"])
            compare([out.loss.item()], [batch.get("mean_loss", batch.get("loss"))], case, dtype)
            compare(gradient[:, 0] / 2, batch["d_chosen"], case, dtype)
            compare(gradient[:, 1] / 2, batch["d_rejected"], case, dtype)
            assert not out.per_pair.requires_grad
            assert abs(out.per_pair.mean().item() - out.loss.item()) <= 1e-6


def test_ld_dpo_is_dpo_on_head_and_weighted_tail():
    golden = GOLDEN["structured"]["ld_dpo"]
    head_w, tail_w, head_l, tail_l, *ref = torch.tensor(golden["rows"], dtype=torch.float64).unbind(
        1
    )
    heads = torch.stack((head_w, head_l), 1).requires_grad_()
    for k in golden["sets"]:
        tails = {
            "tail_w": tail_w.clone().requires_grad_(),
            "tail_l": tail_l.clone().requires_grad_(),
        }
        out = preference_loss(
            heads,
            torch.stack((ref[0], ref[2]), 1),
            loss="ld_dpo",
            ref_tail_w=ref[1],
            ref_tail_l=ref[3],
            **tails,
            **k["params"],
        )
        compare(out.per_pair.detach(), k["loss"], ("ld_dpo", k["params"]), torch.float64)
        grads = torch.autograd.grad(out.per_pair.sum(), (heads, tails["tail_w"], tails["tail_l"]))
        alpha = k["params"]["ld_alpha"]
        assert torch.allclose(grads[1], alpha * grads[0][:, 0], rtol=1e-12, atol=0)
        assert torch.allclose(grads[2], alpha * grads[0][:, 1], rtol=1e-12, atol=0)


def test_tdpo_gives_its_gradient_to_both_kls():
    logps, ref_logps, _ = golden_inputs(torch.float64)
    beta, alpha = 0.1, 0.5
    kw = torch.full((len(ROWS),), 2.0, dtype=torch.float64, requires_grad=True)
    kl = torch.full((len(ROWS),), 3.5, dtype=torch.float64, requires_grad=True)
    d = (logps - ref_logps) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    one = preference_loss(logps, ref_logps, loss="tdpo1", beta=beta, kw=kw, kl=kl)
    g_kw, g_kl = torch.autograd.grad(one.per_pair.sum(), (kw, kl))
    wrong = torch.sigmoid(-beta * (d - 1.5))
    assert torch.allclose(g_kw, -beta * wrong, rtol=1e-12, atol=0)
    assert torch.allclose(g_kl, beta * wrong, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="`kw` asks for a gradient"):
        preference_loss(logps, ref_logps, loss="tdpo2", beta=beta, alpha=alpha, kw=kw, kl=kl)
    two = preference_loss(logps, ref_logps, loss="tdpo2", alpha=alpha, kw=kw.detach(), kl=kl)
    (g_kl,) = torch.autograd.grad(two.per_pair.sum(), kl)
    assert torch.allclose(
        g_kl, alpha * beta * torch.sigmoid(-beta * (d - 0.75)), rtol=1e-12, atol=0
    )
