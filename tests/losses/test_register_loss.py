"""`register_loss`: parameters from the signature, replacing, and functions that cannot be called."""

import inspect
import re

import pytest
import torch

from dpo_ext.testing import check_loss_invariants
from dpo_ext.torch import preference_loss, register_loss
from dpo_ext.torch.losses.catalogue import losses_table
from dpo_ext.torch.losses.registry import LOSSES, LossOptions
from dpo_ext.torch.losses.row import positive
from dpo_ext.torch.losses.signature import OPTIONS

LOGPS = torch.tensor([[-10.0, -12.0], [-7.5, -3.25]])
REF = torch.tensor([[-11.0, -11.5], [-7.5, -3.25]])
NAME = "mine_in_this_file"


def margin(logps, ref_logps):
    ratios = logps - ref_logps
    return ratios[:, 0] - ratios[:, 1]


@pytest.fixture(autouse=True)
def the_table_as_it_was():
    before = dict(LOSSES)
    yield
    LOSSES.clear()
    LOSSES.update(before)


def value(**options):
    return preference_loss(LOGPS, REF, loss=NAME, **options).per_pair


# parameters


def test_a_default_that_is_a_number_is_the_default_and_none_must_be_given():
    @register_loss(NAME)
    def mine(logps, ref_logps, scale, beta=0.5, *, shift=0):
        return scale * (beta * margin(logps, ref_logps) - shift)

    want = 2 * 0.5 * margin(LOGPS, REF)
    assert torch.equal(value(scale=2), want)
    assert torch.equal(value(scale=2, beta=0.25, shift=1), want / 2 - 2)
    assert torch.equal(value(scale=torch.tensor([2.0, 4.0])), want * torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match=f"loss '{NAME}' needs `scale`"):
        value()
    with pytest.raises(ValueError, match="no parameter `betta`\nhint: it has `scale`, `beta`, `sh"):
        value(scale=2, betta=1)
    with pytest.raises(ValueError, match="`beta` must be finite, found nan"):
        value(scale=2, beta=float("nan"))


def test_the_rewards_are_scaled_with_the_beta_of_the_signature():
    register_loss(NAME, lambda logps, ref_logps, beta=0.5: beta * margin(logps, ref_logps))
    out = preference_loss(LOGPS, REF, loss=NAME)
    assert torch.equal(out.chosen_rewards, 0.5 * (LOGPS - REF)[:, 0])


def test_a_default_that_is_no_number_stays_the_function_s_own():
    @register_loss(NAME)
    def mine(logps, ref_logps, beta=1.0, reduction="none", mask=None, **others):
        assert (reduction, mask, others) == ("none", None, {})
        return beta * margin(logps, ref_logps)

    assert torch.equal(value(), margin(LOGPS, REF))
    with pytest.raises(ValueError, match=r"no parameter `reduction`\nhint: it has `beta`$"):
        value(reduction="sum")


def test_what_stands_behind_a_star_is_a_parameter():
    register_loss(NAME, lambda *tensors, beta=2.0: beta * margin(*tensors))
    assert torch.equal(value(), 2 * margin(LOGPS, REF))
    assert torch.equal(value(beta=3.0), 3 * margin(LOGPS, REF))


def test_lengths_are_third_and_no_parameter():
    @register_loss(NAME, lengths=True, reference=False)
    def mine(logps, ref_logps, n, gamma=0.5):
        return gamma - (logps / n)[:, 0]

    lengths = torch.tensor([[2, 3], [5, 2]])
    assert torch.equal(value(lengths=lengths), torch.tensor([5.5, 2.0]))
    with pytest.raises(TypeError, match=r"`lengths` of `<lambda>` .*\nhint: .*lengths=True"):
        register_loss("another", lambda logps, ref_logps, lengths: logps[:, 0] / lengths)
    with pytest.raises(TypeError, match="`weight` of `<lambda>` is an option of preference_loss"):
        register_loss("another", lambda logps, ref_logps, weight=1.0: logps[:, 0] * weight)


def test_no_parameter_can_have_the_name_of_an_option():
    own = inspect.signature(preference_loss).parameters
    assert {*OPTIONS, "beta", "params"} == set(own)


def test_parameters_that_are_given_have_their_domain_and_must_fit_the_function():
    def mine(logps, ref_logps, beta):
        return beta * margin(logps, ref_logps)

    register_loss(NAME, mine, parameters={"beta": positive(2.0)})
    assert torch.equal(value(), 2 * margin(LOGPS, REF))
    with pytest.raises(ValueError, match="`beta` must be > 0"):
        value(beta=0)
    for wrong, why in (({}, "missing a required argument: 'beta'"), ({"beta": 1.0, "gama": 1.0}, "unexpected keyword argument 'gama'")):  # fmt: skip
        with pytest.raises(TypeError, match=f"`mine` cannot be called as loss.*{why}"):
            register_loss("another", mine, parameters=wrong)
    assert "another" not in LOSSES


# replacing


def cell(power, **options):
    """What a cell of a notebook does, each time it runs."""

    @register_loss(NAME, **options)
    def mine(logps, ref_logps):
        return margin(logps, ref_logps) ** power

    return mine


def test_a_cell_can_run_again():
    assert cell(1, replace=True).__name__ == "mine"
    cell(2, replace=True)
    assert torch.equal(value(), margin(LOGPS, REF) ** 2)
    with pytest.raises(ValueError, match=f"has a loss '{NAME}' already\nhint: replace=True"):
        cell(3)
    assert torch.equal(value(), margin(LOGPS, REF) ** 2)


def test_a_built_in_loss_is_replaced_only_by_saying_so():
    want = preference_loss(LOGPS, REF).loss
    order = list(LOSSES)
    for replace in (False, True):
        with pytest.raises(ValueError, match=r"which came with it\nhint: .*replace=\"built-in\""):
            register_loss("dpo", margin, replace=replace)
    assert preference_loss(LOGPS, REF).loss == want
    for _ in range(2):  # the cell that says it can run again too
        register_loss("dpo", margin, replace="built-in")
    assert torch.equal(preference_loss(LOGPS, REF).per_pair, margin(LOGPS, REF))
    assert list(LOSSES) == order
    with pytest.raises(ValueError, match='`replace` must be True, False or "built-in", found \'al'):
        register_loss("dpo", margin, replace="all")


# functions that cannot be called


def of_trl(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps):
    return policy_chosen_logps - policy_rejected_logps - ref_chosen_logps + ref_rejected_logps


HINT = re.escape("hint: `logps` and `ref_logps` are (N, 2), chosen then rejected: `chosen, rej")


def test_the_signature_of_four_tensors_is_told_how_a_loss_is_called():
    calls = [
        lambda: register_loss(NAME, of_trl),
        lambda: preference_loss(LOGPS, REF, loss=of_trl),
        lambda: preference_loss(LOGPS, REF, loss=["dpo", of_trl]),
        lambda: check_loss_invariants(of_trl),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=HINT) as error:
            call()
        assert "it takes the sides of a pair one by one (policy_chosen_logps, " in str(error.value)
        assert "tensor(" not in str(error.value)


def test_other_functions_are_told_what_does_not_fit():
    for function in (lambda: 0, lambda logps: logps, lambda logps, ref, *, beta, extra: logps):
        with pytest.raises(TypeError, match=r"cannot be called as loss\(logps, ref_logps\): "):
            preference_loss(LOGPS, REF, loss=function)
    with pytest.raises(TypeError, match=r"loss\(logps, ref_logps, lengths\).*too many positional"):
        preference_loss(LOGPS, REF, loss=margin, lengths=torch.ones(2, 2))
    with pytest.raises(TypeError, match="`function` must be callable, found int"):
        register_loss(NAME, 3)


def test_an_error_from_within_stays_what_it_is():
    def broken(logps, ref_logps):
        return len(3)

    with pytest.raises(TypeError, match=r"^object of type 'int' has no len\(\)$"):
        preference_loss(LOGPS, REF, loss=broken)


def test_a_registered_loss_is_in_the_listing():
    @register_loss(NAME, monotone=True, text="L = scale*D", paper="ours")
    def mine(logps, ref_logps, scale, beta=0.5):
        return scale * margin(logps, ref_logps)

    entry = losses_table()[len(LOSSES) - 1]
    assert (entry.name, entry.function, entry.registered) == (NAME, "preference_loss", True)
    assert (entry.formula, entry.paper) == ("L = scale*D", "ours")
    assert entry.parameters == "scale=required, beta=0.5"
    assert entry.shape == "falls in chosen, rises in rejected"


def test_both_forms_have_the_options_of_the_function():
    own = list(inspect.signature(register_loss).parameters)
    assert own == ["name", "function", *LossOptions.__annotations__]
