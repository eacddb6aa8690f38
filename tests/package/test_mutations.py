"""Deliberately wrong losses, log-prob functions and collators: `dpo_ext.testing` catches every one.

Each is one edit away from a right one, and most have happened in a published code base. `make deep`
runs them all, `make test` a quarter.
"""

import math

import pytest
import torch
from collators import collate_packed, collate_trl
from sampled import sample
from torch.nn.functional import logsigmoid, softplus

from dpo_ext.testing import check_layouts, check_logps, check_loss_invariants, search
from dpo_ext.torch import ScoreTable, preference_loss, sequence_logps

pytestmark = pytest.mark.slow

BETA = 0.1


@pytest.fixture(autouse=True)
def do_not_shrink(monkeypatch):
    """Catching is the question here; test_testing looks at how the counterexamples read."""
    monkeypatch.setattr(search, "SHRINKS", 0)


def margin(logps, ref):
    ratios = logps - ref
    return ratios[:, 0] - ratios[:, 1]


def dpo(logps, ref):
    return -logsigmoid(BETA * margin(logps, ref))


class WrongBackward(torch.autograd.Function):
    """DPO whose backward forgets one thing."""

    @staticmethod
    def forward(ctx, logps, ref, fault):
        m = BETA * margin(logps, ref)
        ctx.save_for_backward(torch.sigmoid(-m))
        ctx.fault = fault
        return -logsigmoid(m)

    @staticmethod
    def backward(ctx, upstream):
        (slope,) = ctx.saved_tensors
        g = -slope if ctx.fault == "beta" else -BETA * slope
        if ctx.fault != "upstream":
            g = g * upstream
        other = g if ctx.fault == "sign of rejected" else -g
        if ctx.fault == "rejected":
            other = torch.zeros_like(g)
        return torch.stack((g, other), 1), None, None


class OneSidedKink(torch.autograd.Function):
    """A hinge at the margin 0 whose two sides take their slope at the kink from different sides."""

    @staticmethod
    def forward(ctx, logps, ref):
        m = BETA * margin(logps, ref)
        ctx.save_for_backward(m)
        return (-m).relu()

    @staticmethod
    def backward(ctx, upstream):
        (m,) = ctx.saved_tensors
        sides = torch.stack((-BETA * (m <= 0), BETA * (m < 0)), 1)
        return upstream[:, None] * sides, None


def in_place(logps, ref):
    ref -= ref.mean()
    return dpo(logps, ref)


def clamped(logps, ref):
    # right in value, slope 1 instead of 1/2 where policy == reference
    z = -BETA * margin(logps, ref)
    return z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))


def beta_float32(logps, ref):
    return -logsigmoid(BETA * margin(logps.float(), ref.float())).to(logps.dtype)


M = {
    "only_margin": True,
    "monotone": True,
    "convex": True,
    "step0": math.log(2),
    "bounds": (0, None),
    "swap": lambda d: -BETA * d,
}
LOSSES = {
    "wrong sign of the margin": lambda c, f: -logsigmoid(-BETA * margin(c, f)),
    "wrong sign of the loss": lambda c, f: logsigmoid(BETA * margin(c, f)),
    "sides of the reference swapped": lambda c, f: dpo(c, f.flip(1)),
    "sides of the policy swapped": lambda c, f: dpo(c.flip(1), f),
    "no reference": lambda c, f: dpo(c, torch.zeros_like(f)),
    "reference of chosen on both sides": lambda c, f: dpo(c, f[:, :1].expand_as(f)),
    "reference added": lambda c, f: -logsigmoid(BETA * (margin(c, f) + 2 * (f[:, 0] - f[:, 1]))),
    "only the chosen side": lambda c, f: -logsigmoid(BETA * (c - f)[:, 0]),
    "only the rejected side": lambda c, f: -logsigmoid(-BETA * (c - f)[:, 1]),
    "rejected added": lambda c, f: -logsigmoid(BETA * (c - f).sum(1)),
    "chosen detached": lambda c, f: dpo(torch.stack((c[:, 0].detach(), c[:, 1]), 1), f),
    "rejected detached": lambda c, f: dpo(torch.stack((c[:, 0], c[:, 1].detach()), 1), f),
    "all detached": lambda c, f: dpo(c.detach(), f),
    "margin clipped": lambda c, f: -logsigmoid((BETA * margin(c, f)).clamp(-5, 5)) + 0 * c.sum(),
    "log of sigmoid": lambda c, f: -torch.log(torch.sigmoid(BETA * margin(c, f))),
    "log of 1 + exp": lambda c, f: torch.log(1 + torch.exp(-BETA * margin(c, f))),
    "log of sigmoid + 1e-8": lambda c, f: -torch.log(torch.sigmoid(BETA * margin(c, f)) + 1e-8),
    "sigmoid without log": lambda c, f: 1 - torch.sigmoid(BETA * margin(c, f)),
    "softplus with a low threshold": lambda c, f: softplus(-BETA * margin(c, f), threshold=4),
    "slope of the clamp at 0": clamped,
    "ratio of probabilities": lambda c, f: -logsigmoid(BETA * ((c - f).exp()[:, 0] - (c - f).exp()[:, 1])),
    "base 2": lambda c, f: dpo(c, f) / math.log(2),
    "beta outside": lambda c, f: -BETA * logsigmoid(margin(c, f)),
    "a constant too many": lambda c, f: dpo(c, f) + 0.01,
    "summed over the batch": lambda c, f: dpo(c, f).sum(),
    "mean over both sides": lambda c, f: dpo(c, f).sum() / c.numel(),
    "batch mean subtracted": lambda c, f: -logsigmoid(BETA * (margin(c, f) - margin(c, f).mean())),
    "reference of the neighbour": lambda c, f: dpo(c, f.roll(1, 0)),
    "divided by its own maximum": lambda c, f: dpo(c, f) / (1 + dpo(c, f).detach().max()),
    "only the first pair": lambda c, f: dpo(c, f)[:1].mean(),
    "in bfloat16": lambda c, f: dpo(c.bfloat16(), f.bfloat16()).to(c.dtype),
    "margin in float16": lambda c, f: -logsigmoid(BETA * margin(c, f).half().to(c.dtype)),
    "float32 inside": beta_float32,
    "returns float32": lambda c, f: dpo(c, f).float(),
    "returns (N, 1)": lambda c, f: dpo(c, f)[:, None],
    "returns a number": lambda c, f: dpo(c, f).mean().item(),
    "writes to its input": in_place,
    "noise": lambda c, f: dpo(c, f) + 1e-3 * torch.rand(len(c), dtype=c.dtype),
    "smoothing left in": lambda c, f: dpo(c, f) + 0.1 * BETA * margin(c, f),
    "length weighted": lambda c, f: dpo(c, f) * c.abs().sum(1) / c.abs().sum(1).mean().detach(),
    "margin squared": lambda c, f: math.log(2) + (BETA * margin(c, f)) ** 2,
    "absolute margin": lambda c, f: -logsigmoid(BETA * margin(c, f).abs()),
    "tanh inside": lambda c, f: -logsigmoid(torch.tanh(BETA * margin(c, f))) + 1e-9 * c.sum(1),
    "backward forgets beta": lambda c, f: WrongBackward.apply(c, f, "beta"),
    "backward forgets the upstream": lambda c, f: WrongBackward.apply(c, f, "upstream"),
    "backward forgets the rejected side": lambda c, f: WrongBackward.apply(c, f, "rejected"),
    "backward has one sign for both": lambda c, f: WrongBackward.apply(c, f, "sign of rejected"),
}  # fmt: skip


@pytest.mark.parametrize("name", sample(LOSSES))
def test_a_wrong_loss_is_caught(name):
    with pytest.raises(AssertionError) as error:
        check_loss_invariants(LOSSES[name], **M)
    assert "loss" in str(error.value) or "gradient" in str(error.value)


def test_the_right_loss_is_accepted_under_the_same_claims():
    check_loss_invariants(dpo, **M)
    check_loss_invariants(lambda c, f: WrongBackward.apply(c, f, "nothing"), **M)
    check_loss_invariants(lambda c, f: preference_loss(c, f).loss, **M)


def test_writing_to_an_input_is_told_as_that():
    with pytest.raises(AssertionError, match="the loss changes `ref_logps` in place"):
        check_loss_invariants(LOSSES["writes to its input"])


# name: (loss, claims); each makes another claim than DPO's
OTHER_LOSSES = {
    "ipo not squared": (lambda c, f: (margin(c, f) - 5).abs() + 0 * c.sum(), {"swap": lambda d: -20 * d}),
    "ipo with beta for 1/(2 beta)": (lambda c, f: (margin(c, f) - BETA) ** 2, {"step0": 25.0}),
    "cdpo with the smoothing on the wrong side": (
        lambda c, f: -0.9 * logsigmoid(-BETA * margin(c, f)) - 0.1 * logsigmoid(BETA * margin(c, f)),
        {"swap": lambda d: -0.8 * BETA * d},
    ),
    "hinge without its 1": (lambda c, f: (-BETA * margin(c, f)).relu(), {"step0": 1.0}),
    "simpo on sums": (
        lambda c, _, n: -logsigmoid(2 * (c[:, 0] - c[:, 1]) - 0.5),
        {"reference_free": True, "needs_lengths": True},
    ),
    "simpo with the lengths of chosen twice": (
        lambda c, _, n: -logsigmoid(2 * (c / n[:, :1]) @ c.new_tensor([1.0, -1.0]) - 0.5) * n[:, 0] / n.float().mean(),
        {"reference_free": True, "needs_lengths": True},
    ),
    "reference free that reads it": (lambda c, f: dpo(c, 1e-3 * f), {"reference_free": True}),
    "nll of the rejected one": (lambda c, _: -c[:, 1], {"reference_free": True, "monotone": True}),
    "odds ratio without a guard": (
        lambda c, _, n: -logsigmoid(
            (c / n)[:, 0] - torch.log(1 - torch.exp((c / n)[:, 0] * 1e-3)) - (c / n)[:, 1] + torch.log(1 - torch.exp((c / n)[:, 1] * 1e-3))
        ),
        {"reference_free": True, "needs_lengths": True, "monotone": True, "convex": True},
    ),
    "two slopes at one kink": (OneSidedKink.apply, {"only_margin": True}),
    "kto with the sides swapped": (
        lambda c, f: torch.sigmoid(BETA * (c - f)[:, 0]) + torch.sigmoid(-BETA * (c - f)[:, 1]),
        {"monotone": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sample(OTHER_LOSSES))
def test_another_wrong_loss_is_caught(name):
    loss, claims = OTHER_LOSSES[name]
    with pytest.raises(AssertionError):
        check_loss_invariants(loss, **claims)


def scored(logits, table, edit=None):
    """Log-probs by a plain gather, after `edit` of (rows, targets)."""
    keep = table.targets != -100
    weights = torch.ones(len(keep)) if table.weights is None else table.weights
    keep = keep & (weights != 0)
    sequence = torch.bucketize(torch.arange(len(keep)), table.seq_offsets[1:], right=True)
    rows, targets, where, w = (
        table.logit_rows[keep],
        table.targets[keep].long(),
        sequence[keep],
        weights[keep],
    )
    z = logits.float()
    if edit is not None:
        rows, targets, z, w = edit(rows, targets, z, w)
    logp = torch.log_softmax(z[rows], -1).gather(1, targets[:, None])[:, 0] * w
    return torch.zeros(len(table.seq_offsets) - 1).index_add(0, where, logp)


def multiply_mask(logits, table):
    logp = torch.log_softmax(logits.float()[table.logit_rows], -1)
    mask = (table.targets != -100).float() * (1 if table.weights is None else table.weights)
    picked = logp.gather(1, table.targets.clamp(min=0).long()[:, None])[:, 0] * mask
    sequence = torch.bucketize(torch.arange(len(mask)), table.seq_offsets[1:], right=True)
    return torch.zeros(len(table.seq_offsets) - 1).index_add(0, sequence, picked)


def naive(rows, targets, z, w):
    return rows, targets, z - z.exp().sum(-1, keepdim=True).log(), w


def mean_for_sum(logits, table):
    tokens = (table.seq_offsets[1:] - table.seq_offsets[:-1]).clamp(min=1)
    return scored(logits, table) / tokens


def bfloat16_sum(logits, table):
    return scored(logits, table).bfloat16().float()


def no_gradient_through_the_normaliser(logits, table):
    def edit(rows, targets, z, w):
        return rows, targets, z - torch.logsumexp(z, -1, keepdim=True).detach() * 0, w

    exact = scored(logits, table, edit)
    # the same values; only the target's logit keeps its gradient
    keep = (table.targets != -100) & (torch.ones(1) if table.weights is None else table.weights).ne(
        0
    )
    picked = logits.float()[table.logit_rows[keep], table.targets[keep].long()]
    return exact.detach() + 0 * exact + (picked - picked.detach()).sum()


def gradient_everywhere(logits, table):
    """A trace of gradient in rows that nothing scores."""
    through = logits.view_as(logits)
    through.register_hook(lambda g: g + 1e-7)
    return scored(through, table)


def one_on_nothing(logits, table):
    lengths = table.lengths.reshape(-1)
    return scored(logits, table) - 1e-6 * (lengths == 0)


def gradient_without_an_upstream(logits, table):
    through = logits.view_as(logits)
    through.register_hook(
        lambda g: g + 1e-7 * (through.detach() == through.detach()) * (g.abs().sum() == 0)
    )
    return scored(through, table)


LOG_PROBS = {
    "a trace of gradient everywhere": gradient_everywhere,
    "not 0 without a token": one_on_nothing,
    "noise of an ulp": lambda z, t: scored(z, t) * (1 + 2.0**-22 * torch.rand(())),
    "a gradient without an upstream": gradient_without_an_upstream,
    "row shifted by one": lambda z, t: scored(z, t, lambda r, y, x, w: ((r + 1) % len(x), y, x, w)),
    "row before": lambda z, t: scored(z, t, lambda r, y, x, w: ((r - 1) % len(x), y, x, w)),
    "target plus one": lambda z, t: scored(z, t, lambda r, y, x, w: (r, (y + 1) % x.shape[1], x, w)),
    "weights ignored": lambda z, t: scored(z, t, lambda r, y, x, w: (r, y, x, torch.ones_like(w))),
    "weights squared": lambda z, t: scored(z, t, lambda r, y, x, w: (r, y, x, w * w)),
    "no softmax": lambda z, t: scored(z, t, lambda r, y, x, w: (r, y, x * 2, w)),
    "mask multiplied": multiply_mask,
    "exp without the maximum": lambda z, t: scored(z, t, naive),
    "mean for sum": mean_for_sum,
    "bfloat16 sum": bfloat16_sum,
    "bfloat16 logits": lambda z, t: scored(z.bfloat16(), t),
    "negative log-prob": lambda z, t: -scored(z, t),
    "base 2": lambda z, t: scored(z, t) / math.log(2),
    "sequences swapped": lambda z, t: scored(z, t).reshape(-1, 2).flip(1),
    "gradient of the target alone": no_gradient_through_the_normaliser,
    "first sequence only": lambda z, t: torch.cat((scored(z, t)[:1], 0 * scored(z, t)[1:])),
    "detached": lambda z, t: scored(z.detach(), t),
    "NaN replaced in place": lambda z, t: scored(z.detach().nan_to_num_() and z if False else torch.nan_to_num(z) * 1.001, t),
    "column of the vocabulary lost": lambda z, t: scored(torch.cat((z[:, :-1], z[:, -1:] - 30), 1), t),
}  # fmt: skip


@pytest.mark.parametrize("name", sample(LOG_PROBS))
def test_a_wrong_log_prob_function_is_caught(name):
    with pytest.raises(AssertionError, match=r"must|raised|no gradient"):
        check_logps(LOG_PROBS[name])


def test_a_plain_gather_is_accepted():
    check_logps(scored)
    check_logps(sequence_logps)


def edited(edit, collate=collate_trl):
    """A collator with one thing changed in (inputs, table)."""

    def wrong(rows):
        inputs, table = collate(rows)
        return edit(inputs, table, rows)

    return wrong


def table_like(table, **fields):
    parts = {k: getattr(table, k) for k in ("logit_rows", "targets", "seq_offsets")}
    return ScoreTable(**{**parts, **fields})


def swap_sides(inputs, table, rows):
    compact = table.compact()
    order = [s ^ 1 for s in range(len(compact.seq_offsets) - 1)]
    spans = [slice(*compact.seq_offsets[s : s + 2].tolist()) for s in order]
    sizes = [span.stop - span.start for span in spans]
    return inputs, ScoreTable(
        logit_rows=torch.cat([compact.logit_rows[span] for span in spans]),
        targets=torch.cat([compact.targets[span] for span in spans]),
        seq_offsets=torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32),
    )


def pad_is_a_token(rows):
    """Masks made by comparing with the pad id."""
    inputs, table = collate_trl(rows)
    return {**inputs, "attention_mask": (inputs["input_ids"] != 0).long()}, table


def prompt_scored(rows):
    inputs, _ = collate_trl(rows)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return inputs, ScoreTable.from_labels(labels)


def prompt_scored_with_weight_0(rows):
    """The log-probs are right, the lengths count the prompt."""
    inputs, right = collate_trl(rows)
    _, wide = prompt_scored(rows)
    weights = (right.targets != -100).float()
    return inputs, table_like(wide, weights=weights)


def last_token_lost(rows):
    short = [
        {k: v[:-1] if k != "prompt_ids" and len(v) > 1 else v for k, v in row.items()}
        for row in rows
    ]
    return collate_trl(short)


def writes_its_rows(rows):
    for row in rows:
        row["chosen_ids"][:] = row["chosen_ids"][::-1].copy()
    return collate_trl(rows)


COLLATORS = {
    "labels shifted twice": edited(lambda i, t, _: (i, table_like(t, targets=t.targets.roll(-1)))),
    "labels not shifted": edited(lambda i, t, _: (i, table_like(t, logit_rows=(t.logit_rows + 1) % i["input_ids"].numel()))),
    "sides swapped": edited(swap_sides),
    "mask all ones, left padded": edited(lambda i, t, _: ({**i, "attention_mask": torch.ones_like(i["input_ids"])}, t), lambda r: collate_trl(r, "left")),
    "no mask, left padded": edited(lambda i, t, _: ({"input_ids": i["input_ids"]}, t), lambda r: collate_trl(r, "left")),
    "pad id taken for padding": pad_is_a_token,
    "prompt scored": prompt_scored,
    "prompt scored with weight 0": prompt_scored_with_weight_0,
    "last token lost": last_token_lost,
    "positions run on across segments": edited(lambda i, t, _: ({**i, "position_ids": torch.arange(i["input_ids"].numel())[None]}, t), collate_packed),
    "rows of the neighbour": edited(lambda i, t, r: (i, collate_trl(r[::-1])[1])),
    "ids reversed": edited(lambda i, t, _: ({**i, "input_ids": i["input_ids"].flip(1)}, t)),
    "one pair too few": lambda rows: collate_trl(rows[:-1] or rows * 2),
    "prompt cut on one side": lambda rows: collate_trl([{**r, "prompt_ids": r["prompt_ids"][-1:]} for r in rows]),
    "writes its rows": writes_its_rows,
    "raises on one token": lambda rows: collate_trl([{**r, "chosen_ids": r["chosen_ids"][[0, 1]]} for r in rows]),
}  # fmt: skip


@pytest.mark.parametrize("name", sample(COLLATORS))
def test_a_wrong_collator_is_caught(name):
    with pytest.raises(AssertionError, match="rows = "):
        check_layouts(COLLATORS[name])
