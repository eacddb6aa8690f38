"""`preference_loss`: identities, options, metrics and errors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid, softplus

from dpo_ext import TensorError
from dpo_ext.testing import pair_logps
from dpo_ext.torch import preference_loss, register_loss
from dpo_ext.torch.losses.registry import LOSSES

LOGPS = torch.tensor([[-10.0, -12.0], [-7.5, -3.25], [-4.0, -4.0]])
REF = torch.tensor([[-11.0, -11.5], [-7.5, -3.25], [-5.0, -4.5]])
LENGTHS = torch.tensor([[4, 6], [3, 1], [2, 2]])


def margins(case):
    ratios = case.logps - case.ref_logps
    return ratios[:, 0] - ratios[:, 1]


def swapped(case):
    return [t.flip(1) for t in case]


def per_pair(case, loss="dpo", **options):
    return preference_loss(
        case.logps, case.ref_logps, loss=loss, lengths=case.lengths, **options
    ).per_pair


def close(a, b, tolerance=1e-6):
    assert ((a - b).abs() <= tolerance * (1 + b.abs())).all(), (a, b)


@given(pair_logps())
def test_swapping_the_sides_negates_the_margin(case):
    m = 0.1 * margins(case)
    logps, ref, _ = swapped(case)
    back = preference_loss(logps, ref).per_pair
    close(per_pair(case) - back, -m)
    smooth = preference_loss(logps, ref, loss="cdpo", label_smoothing=0.3).per_pair
    close(smooth, per_pair(case, "cdpo", label_smoothing=0.7))


def test_the_value_at_policy_equal_to_reference_is_log_2_to_an_ulp():
    for dtype, ulp in ((torch.float32, 2.0**-24), (torch.float64, 2.0**-53)):
        logps = (-torch.rand(1000, 2) * 3000).to(dtype)
        out = preference_loss(logps, logps)
        assert (out.per_pair - math.log(2)).abs().max() <= ulp
        assert abs(out.loss.item() - math.log(2)) <= 4 * ulp
        assert out.metrics["rewards/accuracies"] == 0  # 33: strict, so 0 at equality


STEP0 = {
    "dpo": math.log(2), "hinge": 1.0, "ipo_sum": 25.0, "sppo_hard": 50.0, "apo_zero": 1.0, "apo_down": 1.0,
    "nca_pair": 2 * math.log(2), "fdpo_js": math.log(2), "bdpo": math.log(2), "chipo": math.log(2),
}  # fmt: skip


@pytest.mark.parametrize("name", STEP0)
def test_the_values_at_policy_equal_to_reference_are_the_catalogue_s(name):
    out = preference_loss(LOGPS.double(), LOGPS.double(), loss=name)
    close(out.per_pair, torch.full((3,), STEP0[name], dtype=torch.float64), 1e-12)


@given(pair_logps(), st.integers(1, 2000))
def test_a_term_of_the_prompt_cancels_in_margin_losses_and_moves_the_others(case, k):
    moved = case._replace(logps=case.logps - k / 64)
    for name, row in LOSSES.items():
        if (
            row.only_margin
            and row.reference
            and not any(p.default is None for p in row.parameters.values())
        ):
            close(per_pair(moved, name), per_pair(case, name), 1e-9)


@pytest.mark.parametrize(
    "name",
    [
        "kto_pair_z", "apo_zero", "apo_down", "nca_pair", "bco_pair", "sppo_hard", "cal_dpo", "dpo_shift", "dpop",
        "bdpo", "bpo_balanced", "fdpo_forward_kl", "fdpo_js", "fdpo_alpha", "chipo", "ipo_avg", "dpo_norm",
    ],
)  # fmt: skip
def test_the_other_losses_do_change(name):
    options = {"kto_pair_z": {"z": 0.5}, "bco_pair": {"delta": 0.0}}.get(name, {})
    logps, ref = LOGPS.double() - 2, REF.double()
    one = preference_loss(logps, ref, loss=name, lengths=LENGTHS, **options).per_pair
    two = preference_loss(logps - 0.5, ref, loss=name, lengths=LENGTHS, **options).per_pair
    assert (one - two).abs().max() > 1e-5


@given(pair_logps())
def test_the_slope_is_beta_times_the_sigmoid_and_scales_with_beta(case):
    logps = case.logps.clone().requires_grad_()
    out = preference_loss(logps, case.ref_logps, beta=0.3)
    (gradient,) = torch.autograd.grad(out.per_pair.sum(), logps)
    g = 0.3 * torch.sigmoid(-0.3 * margins(case))
    assert torch.allclose(gradient, torch.stack((-g, g), 1), rtol=1e-12, atol=0)
    close(
        out.per_pair,
        preference_loss(0.3 * case.logps, 0.3 * case.ref_logps, beta=1.0).per_pair,
        1e-12,
    )


def test_ipo_has_its_minimum_at_one_over_two_beta():
    d = torch.tensor([5.0, 5.5, 4.5, 6.0], dtype=torch.float64)
    logps = torch.stack((d - 20, 0 * d - 20), 1).requires_grad_()
    out = preference_loss(logps, torch.full_like(logps, -20).detach(), loss="ipo_sum", beta=0.1)
    (gradient,) = torch.autograd.grad(out.per_pair.sum(), logps)
    close(out.per_pair, torch.tensor([0.0, 0.25, 0.25, 1.0], dtype=torch.float64))
    close(gradient[:, 0], torch.tensor([0.0, 1.0, -1.0, 2.0], dtype=torch.float64))


@given(pair_logps(), st.integers(0, 63))
def test_smoothing_mixes_the_two_labels_and_robust_undoes_it(case, k):
    eps = k / 128
    flip = case._replace(logps=case.logps.flip(1), ref_logps=case.ref_logps.flip(1))
    mixed = (1 - eps) * per_pair(case) + eps * per_pair(flip)
    close(per_pair(case, "cdpo", label_smoothing=eps), mixed, 1e-12)
    close(per_pair(case, label_smoothing=eps), mixed, 1e-12)
    robust = (1 - eps) * per_pair(case, "robust", label_smoothing=eps)
    robust = robust + eps * per_pair(flip, "robust", label_smoothing=eps)
    close(robust, per_pair(case), 1e-9)


def test_ties_follow_the_stated_rule():
    start = torch.zeros(1, 2, dtype=torch.float64) - 3

    def gradient(logps, name, **options):
        logps = logps.clone().requires_grad_()
        out = preference_loss(logps, start, loss=name, **options)
        return torch.autograd.grad(out.loss, logps)[0][0].tolist()

    assert gradient(start, "dpop", beta=0.3, lam=50.0) == [-0.15, 0.15]  # relu'(0) = 0
    assert gradient(start, "bpo_balanced", beta=0.2, alpha=1.0) == [
        -0.1,
        0.0,
    ]  # the first argument of min
    at_one = start + torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    assert gradient(at_one, "hinge", beta=0.5) == [0.0, 0.0]


# options


def test_parameters_can_differ_from_pair_to_pair():
    beta, gamma = torch.tensor([0.1, 0.5, 0.03]), np.array([0.1, -1.0, 2.0])
    out = preference_loss(LOGPS, REF, loss="margin_dpo", beta=beta, gamma=gamma)
    for i in range(3):
        alone = preference_loss(
            LOGPS[i : i + 1],
            REF[i : i + 1],
            loss="margin_dpo",
            beta=beta[i].item(),
            gamma=float(gamma[i]),
        )
        close(out.per_pair[i : i + 1], alone.per_pair, 1e-6)
        close(out.chosen_rewards[i : i + 1], alone.chosen_rewards, 1e-6)


def test_the_general_row_of_section_8():
    u = 0.2 * ((LOGPS - REF)[:, 0] - (LOGPS - REF)[:, 1])
    margin, eps, weight = (
        torch.tensor([0.3, 0.0, -1.0]),
        torch.tensor([0.1, 0.9, 0.0]),
        [1.0, 2.0, 0.5],
    )
    v = u - margin
    want = softplus(-v) + eps * v
    out = preference_loss(LOGPS, REF, beta=0.2, margin=margin, label_smoothing=eps, weight=weight)
    close(out.per_pair, want, 1e-6)
    close(out.loss, (torch.tensor(weight) * want).sum() / 3, 1e-6)
    kappa = -0.2 / (1 - 0.4)
    robust = preference_loss(
        LOGPS, REF, loss="robust", beta=0.2, margin=margin, label_smoothing=0.2
    )
    close(robust.per_pair, softplus(-v) + kappa * v, 1e-6)


def test_a_pair_of_weight_0_is_not_read():
    logps = LOGPS.clone()
    logps[1] = math.nan
    logps.requires_grad_()
    out = preference_loss(logps, REF, weight=torch.tensor([1.0, 0.0, 1.0]))
    (gradient,) = torch.autograd.grad(out.loss, logps)
    assert gradient[1].tolist() == [0.0, 0.0]
    keep = preference_loss(LOGPS[[0, 2]], REF[[0, 2]], num_pairs=3)
    close(out.loss, keep.loss)


def test_micro_batches_with_num_pairs_add_up_to_the_batch():
    logps = LOGPS.clone().requires_grad_()
    whole = preference_loss(logps, REF)
    (want,) = torch.autograd.grad(whole.loss, logps)
    total = 0
    for part in ([0], [1, 2], []):
        out = preference_loss(logps[part], REF[part], num_pairs=torch.tensor(3))
        total = total + out.loss
    (got,) = torch.autograd.grad(total, logps)
    close(total, whole.loss)
    close(got, want, 1e-6)


def test_no_pairs_give_0_and_no_nan():
    out = preference_loss(LOGPS[:0], REF[:0])
    assert out.loss.item() == 0
    assert all(v.item() == 0 for v in out.metrics.values())


def test_both_outputs_can_be_used_at_once():
    logps = LOGPS.double().requires_grad_()
    out = preference_loss(logps, REF.double())
    (got,) = torch.autograd.grad(
        2 * out.loss + (out.per_pair * torch.tensor([1.0, 0.0, -3.0])).sum(), logps
    )
    (parts,) = torch.autograd.grad(preference_loss(logps, REF.double()).per_pair.sum(), logps)
    factor = 2 / 3 + torch.tensor([1.0, 0.0, -3.0], dtype=torch.float64)
    close(got, parts * factor[:, None], 1e-12)


def test_metrics_have_the_keys_and_values_of_trl():
    out = preference_loss(LOGPS, REF, beta=0.5)
    ratios = 0.5 * (LOGPS - REF)
    assert {k: round(v.item(), 6) for k, v in out.metrics.items()} == {
        "rewards/chosen": round(ratios[:, 0].mean().item(), 6),
        "rewards/rejected": round(ratios[:, 1].mean().item(), 6),
        "rewards/accuracies": round(2 / 3, 6),
        "rewards/margins": round((ratios[:, 0] - ratios[:, 1]).mean().item(), 6),
        "logps/chosen": round(LOGPS[:, 0].mean().item(), 6),
        "logps/rejected": round(LOGPS[:, 1].mean().item(), 6),
    }
    assert torch.equal(out.chosen_rewards, ratios[:, 0])
    assert torch.equal(out.rejected_rewards, ratios[:, 1])
    assert not out.chosen_rewards.requires_grad
    assert repr(out).startswith("PreferenceLoss(loss=tensor(")


def test_a_callable_and_a_registered_loss_give_what_the_row_gives():
    def mine(logps, ref_logps, beta=0.1):
        ratios = logps - ref_logps
        return -logsigmoid(beta * (ratios[:, 0] - ratios[:, 1]))

    want = preference_loss(LOGPS, REF, beta=0.3)
    got = preference_loss(LOGPS, REF, loss=mine, beta=0.3, weight=[1, 1, 1])
    close(got.per_pair, want.per_pair)
    close(got.chosen_rewards, want.chosen_rewards)
    scalar = preference_loss(LOGPS, REF, loss=lambda c, f, n: mine(c, f).mean(), lengths=LENGTHS)
    close(scalar.loss, preference_loss(LOGPS, REF).loss)
    register_loss("mine_in_this_test", mine, parameters={"beta": None})
    try:
        close(preference_loss(LOGPS, REF, loss="mine_in_this_test", beta=0.3).loss, want.loss)
        both = preference_loss(
            LOGPS, REF, loss=["mine_in_this_test", "dpo"], beta=0.3, loss_weights=[2, -1]
        )
        close(both.loss, want.loss)
        with pytest.raises(ValueError, match="needs `beta`"):
            preference_loss(LOGPS, REF, loss="mine_in_this_test")
        with pytest.raises(ValueError, match="has a loss 'mine_in_this_test' already"):
            register_loss("mine_in_this_test", mine)
    finally:
        del LOSSES["mine_in_this_test"]


def test_a_list_gives_each_loss_the_parameters_it_has():
    out = preference_loss(
        LOGPS,
        REF,
        loss=["dpo", "simpo", "sft"],
        lengths=LENGTHS,
        beta=0.3,
        gamma=0.1,
        loss_weights=[1, 0.5, 2],
    )
    want = preference_loss(LOGPS, REF, beta=0.3).per_pair
    want = (
        want
        + 0.5 * preference_loss(LOGPS, loss="simpo", lengths=LENGTHS, beta=0.3, gamma=0.1).per_pair
    )
    want = want + 2 * preference_loss(LOGPS, loss="sft", lengths=LENGTHS).per_pair
    close(out.per_pair, want)
    close(out.loss, want.mean())


# errors


def nan_at(tensor, i, j):
    tensor = tensor.clone()
    tensor[i, j] = math.nan
    return tensor


ERRORS = [
    ({"logps": LOGPS[:, :1]}, TensorError, "`logps` must be float32 or float64 of shape (N, 2), found float32 of shape (3, 1)"),
    ({"logps": LOGPS.bfloat16()}, TensorError, "hint: use `logps.float()`"),
    ({"logps": LOGPS.long()}, TensorError, "found int64"),
    ({"logps": LOGPS.numpy()}, TypeError, "`logps` must be a torch tensor, found ndarray"),
    ({"ref_logps": None}, TensorError, "`ref_logps` is missing: loss 'dpo' needs"),
    ({"ref_logps": REF[:2]}, TensorError, "`ref_logps` must be float32 of shape (3, 2) as `logps`"),
    ({"ref_logps": REF.double()}, TensorError, "hint: use `ref_logps.to(logps.dtype)`"),
    ({"ref_logps": REF.to("meta")}, TensorError, "`ref_logps` must be on cpu as `logps`, found it on meta"),
    ({"ref_logps": REF.clone().requires_grad_()}, TensorError, "`torch.no_grad()`"),
    ({"ref_logps": 3.0}, TypeError, "`ref_logps` must be a torch tensor"),
    ({"logps": nan_at(LOGPS, 1, 0)}, TensorError, "pair 1: `logps` must not be NaN, found NaN for chosen"),
    ({"ref_logps": nan_at(REF, 2, 1)}, TensorError, "pair 2: `ref_logps` must not be NaN, found NaN for rejected"),
    ({"logps": LOGPS - math.inf, "ref_logps": REF - math.inf}, TensorError, "pair 0: loss 'dpo' is NaN for logps [-inf"),
    ({"loss": "dpoo"}, ValueError, "unknown loss 'dpoo'\nhint: did you mean 'dpo'"),
    ({"loss": "kto"}, ValueError, "hint: dpo_ext.torch.unpaired_loss has it"),
    ({"loss": 3}, TypeError, "`loss` must be a name, a callable or a list"),
    ({"beta": 0.0}, ValueError, "`beta` must be > 0, found 0.0"),
    ({"beta": math.nan}, ValueError, "`beta` must be > 0, found nan"),
    ({"beta": "much"}, TypeError, "`beta` must be one number or 3, found str"),
    ({"beta": torch.tensor([0.1, 0.1])}, TensorError, "`beta` must be a number or of shape (3,), found float32 of shape (2,)"),
    ({"beta": torch.tensor([0.1, -0.1, 0.1])}, ValueError, "pair 1: `beta` must be > 0, found -0.1"),
    ({"beta": torch.tensor(0.1, requires_grad=True)}, TensorError, "`beta` asks for a gradient"),
    ({"gamma": 1.0}, ValueError, "loss 'dpo' has no parameter `gamma`\nhint: it has `beta`, `margin`, `label_smoothing`"),
    ({"loss": "sft", "beta": 0.1, "lengths": LENGTHS}, ValueError, "loss 'sft' has no parameter `beta`\nhint: it has no parameter"),
    ({"loss": "odpo"}, ValueError, "loss 'odpo' needs `score_gap` (> 0)"),
    ({"loss": "robust", "label_smoothing": 0.5}, ValueError, "`label_smoothing` must be in [0, 0.5), found 0.5"),
    ({"loss": "exo_pair", "label_smoothing": 0.0}, ValueError, "`label_smoothing` must be in (0, 1), found 0.0"),
    ({"loss": "hinge", "margin": 0.1}, ValueError, "loss 'hinge' has no parameter `margin`"),
    ({"loss": "wpo", "aw": 0.0, "al": 0.0, "clamp": [1, 0, 1]}, ValueError, "`clamp` must be 0 or 1 for all pairs"),
    ({"loss": "simpo"}, TensorError, "hint: pass `lengths=table.lengths`"),
    ({"loss": "simpo", "lengths": LENGTHS[:2]}, TensorError, "`lengths` must be integers of shape (3, 2), found int64 of shape (2, 2)"),
    ({"loss": "simpo", "lengths": LENGTHS * torch.tensor([1, 0])}, TensorError, "pair 0: `lengths` must be >= 1 for rejected with log-prob -12, found 0"),
    ({"loss": "simpo", "lengths": -LENGTHS}, TensorError, "found -4"),
    ({"loss": "simpo", "lengths": [[1, 2]]}, TypeError, "`lengths` must be a torch tensor"),
    ({"weight": [1.0, -1.0, 1.0]}, ValueError, "pair 1: `weight` must be >= 0, found -1"),
    ({"weight": [1.0, 1.0]}, TensorError, "`weight` must be a number or of shape (3,)"),
    ({"num_pairs": 0}, ValueError, "`num_pairs` must be > 0, found 0"),
    ({"num_pairs": torch.tensor([1, 2])}, TensorError, "`num_pairs` must be one number"),
    ({"loss": ["dpo", "hinge"], "loss_weights": [1.0]}, ValueError, "`loss_weights` must have 2 factors"),
    ({"loss": "dpo", "loss_weights": [1.0]}, ValueError, "`loss_weights` needs a list"),
    ({"loss": []}, ValueError, "`loss_weights` must have 0 factors"),
    ({"loss": ["dpo", "hinge"], "gamma": 1.0}, ValueError, "none of the losses ['dpo', 'hinge'] has a parameter `gamma`"),
    ({"loss": lambda c, f: c}, TensorError, "must return a scalar or (3,), found (3, 2)"),
    ({"loss": lambda c, f: c.sum(), "weight": 1.0}, ValueError, "returns a scalar"),
    ({"loss": "aot_paired", "num_pairs": 8}, ValueError, "couples the batch"),
    ({"loss": "dr_dpo", "weight": 1.0}, ValueError, "couples the batch"),
    ({"loss": "aot_paired", "beta": [0.1, 0.1, 0.1]}, ValueError, "`beta` must be > 0 for all pairs"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "kind", "message"), ERRORS, ids=[str(i) for i in range(len(ERRORS))]
)
def test_bad_input_is_a_typed_error_that_names_it(change, kind, message):
    with pytest.raises(kind) as error:
        preference_loss(**{"logps": LOGPS, "ref_logps": REF, **change})
    assert message in str(error.value)


def test_a_sequence_without_a_scored_token_has_the_average_0():
    logps = torch.tensor([[-6.0, 0.0]], requires_grad=True)
    out = preference_loss(logps, loss="simpo", lengths=torch.tensor([[3, 0]]), beta=2.0, gamma=0.5)
    (gradient,) = torch.autograd.grad(out.loss, logps)
    close(out.loss, softplus(torch.tensor(4.5)))
    assert gradient.isfinite().all()


def test_a_second_derivative_is_refused():
    logps = LOGPS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(preference_loss(logps, REF).loss, logps, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once, not twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", ["dpo", "orpo", "tdpo1", "chipo", "aot_unpaired", "dr_dpo"])
def test_gradcheck(name):
    options = {
        "tdpo1": {"kw": torch.tensor([0.1, 0.2, 0.3]).double().requires_grad_(), "kl": 0.5}
    }.get(name, {})
    # no two pairs alike: at a tie of a sort the slope depends on the side it is taken from
    ref = REF.double() + torch.tensor([[0.01, -0.02], [0.3, 0.11], [-0.07, 0.05]])
    extra = [v for v in options.values() if isinstance(v, torch.Tensor)]

    def run(logps, *_):
        return preference_loss(logps, ref, loss=name, lengths=LENGTHS, **options).loss

    assert torch.autograd.gradcheck(run, (LOGPS.double().requires_grad_(), *extra), atol=1e-6)
