"""Every loss of the table against the golden file: values and both gradients, in float64 and float32."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_ext.torch import preference_loss
from dpo_ext.torch.loss_row import LOSSES

GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden_losses.json").read_text())
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
