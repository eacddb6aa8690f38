"""`audit_first_step`: what the dtype explains passes, anything else is an error that says what it looks like."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dpo_ext.errors import RefLogpsError
from dpo_ext.torch import audit_first_step
from dpo_ext.torch.audit import allowed, causes_of, first_difference

GENERATOR = torch.Generator().manual_seed(0)
LENGTHS = torch.randint(5, 200, (6, 2), generator=GENERATOR)
LOGPS = -2.0 * LENGTHS - torch.rand(6, 2, generator=GENERATOR)


def refused(ref, dtype=torch.float32, logps=LOGPS, lengths=LENGTHS, **options) -> str:
    with pytest.raises(RefLogpsError) as caught:
        audit_first_step(logps, ref, lengths, dtype=dtype, **options)
    return str(caught.value)


@pytest.mark.parametrize(("dtype", "of_the_root"), [(torch.bfloat16, 0.02), (torch.float16, 0.005)])
def test_half_width_allows_a_part_of_the_root_of_the_tokens(dtype, of_the_root):
    budget = of_the_root * LENGTHS.sqrt()
    torch.testing.assert_close(allowed(LOGPS, LENGTHS, dtype), budget)
    audit_first_step(LOGPS, LOGPS + 0.99 * budget, LENGTHS, dtype=dtype)
    audit_first_step(LOGPS, LOGPS - 0.99 * budget, LENGTHS, dtype=dtype)
    assert "12 of 12 sequences" in refused(LOGPS + 1.01 * budget, dtype)


def test_float32_allows_a_thousandth_of_a_nat_or_a_millionth_of_the_log_prob():
    audit_first_step(LOGPS, LOGPS + 9e-4, LENGTHS, dtype=torch.float32)
    assert "explains 0.001" in refused(LOGPS + 2e-3)
    long = torch.full((1, 2), -5000.0).double()
    audit_first_step(long, long + 4.9e-3, LENGTHS[:1], dtype=torch.float32)
    refused(long + 5.1e-3, logps=long, lengths=LENGTHS[:1])


@pytest.mark.parametrize(
    ("precision", "dtype"), [("high", torch.float16), ("medium", torch.bfloat16)]
)
def test_float32_whose_products_are_rounded_allows_as_much_as_these(precision, dtype):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = allowed(LOGPS, LENGTHS, torch.float32)
        assert torch.equal(found, allowed(LOGPS, LENGTHS, dtype))
    finally:
        torch.set_float32_matmul_precision(before)


def test_one_sequence_that_is_off_is_named_with_the_loss_that_it_gives():
    ref = LOGPS.clone()
    ref[4, 1] += 3.0
    message = refused(ref)
    assert "1 of 12 sequences" in message
    assert "pair 4, rejected: " in message
    assert " 3 nats" in message
    ratios = (LOGPS - ref).double()
    loss = -nn.functional.logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])).mean()
    assert f"{loss:.4f} in place of 0.6931" in message
    assert "usual causes: dropout" in message
    assert "hint: audit=False" in message


CUT = torch.where(LENGTHS.float().quantile(0.7) <= LENGTHS, LOGPS + 30.0, LOGPS)


@pytest.mark.parametrize(
    ("ref", "looks_like"),
    [
        (LOGPS.flip(1), "chosen and rejected are swapped"),
        (LOGPS / LENGTHS, "means over tokens, not sums"),
        (LOGPS.roll(2, 0), "rows are those of other pairs"),
        (CUT, "scored tokens or more are off: the reference was cut at another `max_length`"),
        (torch.where(LOGPS > -150, LOGPS, 0.0), "has log-prob 0 for"),
    ],
)
def test_what_the_numbers_look_like_is_said(ref, looks_like):
    message = refused(ref)
    assert looks_like in message
    assert "usual causes" not in message


def test_values_of_another_model_look_like_nothing_and_the_usual_causes_are_listed():
    message = refused(
        LOGPS * (1 + 0.3 * torch.rand(6, 2, generator=torch.Generator().manual_seed(5)))
    )
    assert "found:" not in message
    assert all(word in message for word in ("dropout", "autocast", "PiSSA", "max_length", "order"))


def test_long_sequences_that_are_barely_off_are_not_blamed_on_a_cut():
    longest = LENGTHS.max() == LENGTHS
    assert "max_length`, or keeps" not in refused(torch.where(longest, LOGPS + 2e-3, LOGPS))


def test_causes_are_asked_for_only_where_there_is_something_to_explain():
    asked = []

    def causes(drift):
        asked.append(drift)
        return ["it is the cause"]

    audit_first_step(LOGPS, LOGPS, LENGTHS, dtype=torch.float32, causes=causes)
    assert not asked
    assert "found: it is the cause" in refused(LOGPS + 1, causes=causes)
    assert torch.equal(asked[0].ref_logps, (LOGPS + 1).double())


def test_no_rank_goes_on_alone():
    with pytest.raises(RefLogpsError, match="on another rank"):
        audit_first_step(LOGPS, LOGPS, LENGTHS, dtype=torch.float32, any_rank=lambda _: True)
    told = []
    refused(LOGPS + 1, any_rank=lambda wrong: told.append(wrong) or wrong)
    assert told == [True]


def test_a_log_prob_that_is_no_number_is_left_to_the_loss():
    logps = LOGPS.clone()
    logps[0, 0] = torch.nan
    audit_first_step(logps, LOGPS, LENGTHS, dtype=torch.float32)


def test_a_batch_without_pairs_passes():
    audit_first_step(LOGPS[:0], LOGPS[:0], LENGTHS[:0], dtype=torch.float32)


def test_models_tell_of_dropout_modes_dtypes_and_attention():
    policy = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
    reference = copy.deepcopy(policy).eval()
    assert list(causes_of(policy.eval(), reference)) == []
    policy.train()
    assert list(causes_of(policy, None)) == ["dropout is on in the policy: Dropout 0.1"]
    policy[1].p = 0.0
    assert list(causes_of(policy, None)) == []
    reference.train()
    reference.to(torch.bfloat16)
    policy.config, reference.config = (type("C", (), {"_attn_implementation": n}) for n in "ab")
    assert list(causes_of(policy, reference)) == [
        "the reference is in training mode",
        "the weights are float32 in the policy and bfloat16 in the reference",
        "the attention is a in the policy and b in the reference",
    ]


def test_other_weights_are_another_model_and_rounded_ones_are_the_same():
    policy = nn.Linear(3, 3)
    reference = copy.deepcopy(policy)
    assert first_difference(policy, reference) is None
    assert first_difference(policy, copy.deepcopy(policy).to(torch.bfloat16)) is None
    with torch.no_grad():
        reference.bias[1] += 1e-3
    assert first_difference(policy, reference) == "bias"
    assert first_difference(policy, nn.Linear(3, 4)) == "weight"
    assert first_difference(policy, nn.Linear(3, 3, bias=False)) is not None
