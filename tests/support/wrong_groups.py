"""Wrong losses of single completions and of lists, and what each claims to be."""

import math

import torch
from torch.nn.functional import logsigmoid, softplus
from wrong_losses import Downstream, Upstream

from dpo_ext.testing import check_list_loss, check_unpaired_loss

BETA = 0.1


def kto(c, f, labels):
    a = BETA * (c - f)
    return torch.where(labels, torch.sigmoid(-a), torch.sigmoid(a))


def when(asked, change=lambda x: x * 1.01):
    """KTO that is wrong for a batch of which `asked` holds."""
    return lambda c, f, labels: (
        change(kto(c, f, labels)) if asked(c, f, labels) else kto(c, f, labels)
    )


def memory(t):
    return torch.as_strided(t, t.shape, (1,), t.storage_offset())


def first_call_wrong():
    calls = []

    def loss(c, f, labels):
        calls.append(1)
        return kto(c, f, labels) * (2 if len(calls) == 1 else 1)

    return loss


def running_z():
    kept = {"z": 0.0}

    def loss(c, f, labels):
        kept["z"] = 0.9 * kept["z"] + 0.1 * (c - f).mean().item()
        return kto(c, f + kept["z"], labels)

    return loss


START = {"step0": 0.5, "bounds": (0, 1)}
KTO = {"like": "kto", "parameters": {"beta": BETA, "z": 0.0}}
BCO = {"like": "bco", "parameters": {"beta": BETA, "delta": 0.3}}
UNPAIRED = {
    "labels swapped": (lambda c, f, y: kto(c, f, ~y), {}),
    "labels not read": (lambda c, f, y: kto(c, f, torch.ones_like(y)), {}),
    "labels as -1 and 1, 0 read as desirable": (lambda c, f, y: kto(c, f, y.long() >= 0), {}),
    "label of the neighbour": (lambda c, f, y: kto(c, f, y.roll(1)), {}),
    "label of the first for all": (lambda c, f, y: kto(c, f, y[:1].expand_as(y)), {}),
    "label by majority": (lambda c, f, y: kto(c, f, (y.double().mean() >= 0.5).expand_as(y)), {}),
    "no reference": (lambda c, f, y: kto(c, 0 * f, y), {}),
    "reference added": (lambda c, f, y: kto(c, -f, y), {}),
    "reference of the undesirable not read": (lambda c, f, y: kto(c, f * y, y), {}),
    "reference at least -100": (lambda c, f, y: kto(c, f.clamp(min=-100), y), {}),
    "reference in bfloat16": (lambda c, f, y: kto(c, f.bfloat16().to(f.dtype), y), {}),
    "reference times 0.999": (lambda c, f, y: kto(c, f * 0.999, y), {}),
    "log-probs at most -1e-3": (lambda c, f, y: kto(c.clamp(max=-1e-3), f, y), {}),
    "log-probs at least -9000": (lambda c, f, y: kto(c.clamp(min=-9000), f, y), KTO),
    "no gradient where the policy is certain": (lambda c, f, y: kto(c * (c != 0), f, y), {}),
    "a certain completion left out": (lambda c, f, y: kto(c, f, y) * (c != 0), {}),
    "NaN where the policy is certain": (lambda c, f, y: kto(c, f, y) * (c / c), {}),
    "z of the batch": (lambda c, f, y: kto(c, f + (c - f).mean().detach(), y), {}),
    "z of the desirable ones": (lambda c, f, y: kto(c, f + ((c - f) * y).sum().detach() / y.sum().clamp(min=1), y), {}),
    "a z that runs": (running_z(), {}),
    "weights that balance the batch": (lambda c, f, y: kto(c, f, y) * torch.where(y, (~y).sum() + 1, y.sum() + 1), {}),
    "mean over the desirable": (lambda c, f, y: (kto(c, f, y) * y).sum() / y.sum().clamp(min=1), {}),
    "0 / 0 without a desirable one": (lambda c, f, y: kto(c, f, y) + 0 * c[y].mean(), {}),
    "0 / 0 without an undesirable one": (lambda c, f, y: kto(c, f, y) + 0 * c[~y].mean(), {}),
    "summed": (lambda c, f, y: kto(c, f, y).sum(), {}),
    "the last one left out": (lambda c, f, y: kto(c, f, y)[:-1].mean() if len(c) > 1 else kto(c, f, y), {}),
    "the desirable ones first": (lambda c, f, y: torch.cat((kto(c, f, y)[y], kto(c, f, y)[~y])), {}),
    "wrong for one": (when(lambda c, f, y: len(c) == 1), {}),
    "wrong for two": (when(lambda c, f, y: len(c) == 2), {}),
    "wrong for five": (when(lambda c, f, y: len(c) == 5), {}),
    "wrong from six on": (when(lambda c, f, y: len(c) > 5), {}),
    "wrong for an odd number": (when(lambda c, f, y: len(c) % 2 == 1), {}),
    "wrong where all are desirable": (when(lambda c, f, y: bool(y.all())), {}),
    "wrong where none is desirable": (when(lambda c, f, y: not bool(y.any())), {}),
    "raises where none is desirable": (lambda c, f, y: kto(c, f, y) if bool(y.any()) else [][0], {}),
    "exp of a ratio": (lambda c, f, y: torch.where(y, 1 / (1 + torch.exp(BETA * (c - f))), 1 - 1 / (1 + torch.exp(BETA * (c - f)))), {}),
    "log of a sigmoid": (lambda c, f, y: -torch.log(torch.where(y, torch.sigmoid(BETA * (c - f)), torch.sigmoid(-BETA * (c - f)))), {}),
    "undesirable slope 1 % short": (lambda c, f, y: torch.where(y, kto(c, f, y), Upstream.apply(kto(c, f, y), lambda g: g * 0.99)), {}),
    "absolute upstream": (lambda c, f, y: Upstream.apply(kto(c, f, y), torch.abs), {}),
    "upstream averaged": (lambda c, f, y: Upstream.apply(kto(c, f, y), lambda g: g.mean().expand_as(g)), {}),
    "upstream within 1000": (lambda c, f, y: Upstream.apply(kto(c, f, y), lambda g: g.clamp(-1e3, 1e3)), {}),
    "gradient of the undesirable dropped": (lambda c, f, y: kto(Downstream.apply(c, lambda g, c, y=y: g * y), f, y), {}),
    "gradient below log-probs of -500 dropped": (lambda c, f, y: -logsigmoid(BETA * (Downstream.apply(c, lambda g, c: g * (c > -500)) - f) * (2 * y - 1)), {}),
    "strides not read": (lambda c, f, y: kto(memory(c), memory(f), y), {}),
    "strides of the labels not read": (lambda c, f, y: kto(c, f, memory(y)), {}),
    "changes the reference": (lambda c, f, y: kto(c, f.sub_(f.mean()), y), {}),
    "changes the labels": (lambda c, f, y: kto(c, f, y.logical_not_().logical_not()), {}),
    "wrong in its first call": (first_call_wrong(), {}),
    "another one without gradients": (lambda c, f, y: kto(c, f, y) * (1 if torch.is_grad_enabled() else 1.01), {}),
    "random": (lambda c, f, y: kto(c, f, y) + 1e-6 * torch.rand(()), {}),
    "in bfloat16": (lambda c, f, y: kto(c.bfloat16(), f.bfloat16(), y).to(c.dtype), {}),
    "returns float32": (lambda c, f, y: kto(c, f, y).float(), {}),
    "returns (N, 1)": (lambda c, f, y: kto(c, f, y)[:, None], {}),
    "starts at 1": (lambda c, f, y: 2 * kto(c, f, y), START),
    "1 too many": (lambda c, f, y: kto(c, f, y) + 1, START),
    "negative": (lambda c, f, y: kto(c, f, y) - 1, {"bounds": (0, 1)}),
    "beta outside": (lambda c, f, y: BETA * kto(c / BETA, f / BETA, y), KTO),
    "twice the weight of the undesirable": (lambda c, f, y: kto(c, f, y) * (2 - y.to(c.dtype)), KTO),
    "ratio within 100": (lambda c, f, y: kto((c - f).clamp(-100, 100), 0 * f, y) + 1e-9 * f, KTO),
    "bco with its delta added": (lambda c, f, y: softplus(torch.where(y, -1.0, 1.0).to(c.dtype) * (BETA * (c - f) + 0.3)), BCO),
    "bco without its delta": (lambda c, f, y: softplus(torch.where(y, -1.0, 1.0).to(c.dtype) * (BETA * (c - f))), BCO),
    "bco with a sigmoid": (lambda c, f, y: kto(c, f + 3, y), BCO),
}  # fmt: skip


def ranking(c, f):
    x = BETA * (c - f)
    return sum(torch.logsumexp(x[:, k:], 1) - x[:, k] for k in range(x.shape[1]))


def first(c, f):
    """The first against the others."""
    x = BETA * (c - f)
    return softplus(torch.logsumexp(x[:, 1:], 1) - x[:, 0])


def masked(c, f, counts):
    """The ranking of as many as there are."""
    there = torch.arange(c.shape[1]) < counts[:, None]
    x = (BETA * (c - f)).masked_fill(~there, -float("inf"))
    terms = [torch.logsumexp(x[:, k:], 1) - x[:, k] for k in range(2)]
    for k in range(2, c.shape[1]):
        here = there[:, k]
        part = torch.where(here[:, None], x[:, k:], torch.zeros_like(x[:, k:]))
        terms.append(torch.where(here, torch.logsumexp(part, 1) - part[:, 0], 0.0))
    return sum(terms)


def nca(c, f, scores):
    x = BETA * (c - f)
    return (torch.softmax(scores, 1) * softplus(-x) + softplus(x) / x.shape[1]).sum(1)


def rows(t):
    return torch.as_strided(t, t.shape, (t.shape[1], 1), t.storage_offset())


def log_factorial(K):
    return math.log(math.factorial(K))


R = {"only_margin": True, "monotone": True, "step0": log_factorial}
PL = {"like": "plackett_luce", "parameters": {"beta": BETA}}
COUNTS = {"needs_counts": True, "only_margin": True}
SCORES = {"needs_scores": True}
NCA = {**SCORES, "like": "nca", "parameters": {"beta": BETA, "alpha": 1.0}}
LISTS = {
    "best last": (lambda c, f: ranking(c.flip(1), f.flip(1)), R),
    "reference turned": (lambda c, f: ranking(c, f.flip(1)), R),
    "no reference": (lambda c, f: ranking(c, 0 * f), R),
    "reference of the first for all": (lambda c, f: ranking(c, f[:, :1].expand_as(f)), R),
    "reference of the last not read": (lambda c, f: ranking(c, torch.cat((f[:, :-1], 0 * f[:, -1:]), 1)), {}),
    "reference in float16": (lambda c, f: ranking(c, f.half().to(f.dtype)), R),
    "the last place left out": (lambda c, f: ranking(c[:, :-1], f[:, :-1]) if c.shape[1] > 2 else ranking(c, f), R),
    "the first place alone": (lambda c, f: torch.logsumexp(BETA * (c - f), 1) - BETA * (c - f)[:, 0], R),
    "each against the whole list": (lambda c, f: (torch.logsumexp(BETA * (c - f), 1, keepdim=True) - BETA * (c - f)).sum(1), R),
    "each against those before it": (lambda c, f: ranking(-c, -f), R),
    "a mean over places": (lambda c, f: ranking(c, f) / c.shape[1], R),
    "a mean over places, as a step": (lambda c, f: ranking(c, f) * 2 / c.shape[1], PL),
    "wrong for two": (lambda c, f: ranking(c, f) * (1.01 if c.shape[1] == 2 else 1), R),
    "wrong for three": (lambda c, f: ranking(c, f) * (1.01 if c.shape[1] == 3 else 1), R),
    "wrong for five": (lambda c, f: ranking(c, f) * (1.01 if c.shape[1] == 5 else 1), R),
    "four places at most": (lambda c, f: ranking(c[:, :4], f[:, :4]), R),
    "wrong for one list": (lambda c, f: ranking(c, f) * (1.01 if len(c) == 1 else 1), {}),
    "wrong for four lists": (lambda c, f: ranking(c, f) * (1.01 if len(c) == 4 else 1), {}),
    "the last list left out": (lambda c, f: ranking(c, f)[:-1].mean() if len(c) > 1 else ranking(c, f), {}),
    "summed": (lambda c, f: ranking(c, f).sum(), {}),
    "mean over all entries": (lambda c, f: ranking(c, f).sum() / c.numel(), {"step0": log_factorial}),
    "softmax over the batch": (lambda c, f: -torch.log_softmax(BETA * (c - f), 0).sum(1), {}),
    "exponentials without their maximum": (lambda c, f: torch.log(torch.exp(BETA * (c - f)).sum(1)) - BETA * (c - f)[:, 0], {"only_margin": True}),
    "log of a softmax": (lambda c, f: -torch.log(torch.softmax(BETA * (c - f), 1)[:, 0]), {"only_margin": True}),
    "log of a softmax and 1e-9": (lambda c, f: -torch.log(torch.softmax(BETA * (c - f), 1)[:, 0] + 1e-9), {"like": lambda c, f: -torch.log_softmax(BETA * (c - f), 1)[:, 0]}),
    "ratios within 100": (lambda c, f: ranking((c - f).clamp(-100, 100), 0 * f), R),
    "log-probs at least -9000": (lambda c, f: ranking(c.clamp(min=-9000), f), R),
    "no gradient where the policy is certain": (lambda c, f: ranking(c * (c != 0), f), {}),
    "a certain completion taken for padding": (lambda c, f: ranking(c.masked_fill(c == 0, -50.0), f), {}),
    "gradient of the last place dropped": (lambda c, f: ranking(Downstream.apply(c, lambda g, c: torch.cat((g[:, :-1], 0 * g[:, -1:]), 1)), f), {}),
    "gradient of the first place alone": (lambda c, f: ranking(torch.cat((c[:, :1], c[:, 1:].detach()), 1), f), {}),
    "gradient turned": (lambda c, f: ranking(Downstream.apply(c, lambda g, c: g.flip(1)), f), {}),
    "absolute upstream": (lambda c, f: Upstream.apply(ranking(c, f), torch.abs), {}),
    "upstream of the first list for all": (lambda c, f: Upstream.apply(ranking(c, f), lambda g: g[:1].expand_as(g)), {}),
    "strides not read": (lambda c, f: ranking(rows(c), rows(f)), {}),
    "changes the policy": (lambda c, f: ranking(c.sub_(c.detach().amax(1, keepdim=True)), f), {}),
    "sorted by the policy": (lambda c, f: ranking(*(t.gather(1, (c - f).argsort(1, descending=True)) for t in (c, f))), R),
    "beta outside": (lambda c, f: BETA * ranking(c / BETA, f / BETA), PL),
    "half of it": (lambda c, f: ranking(c, f) / 2, PL),
    "a constant too many": (lambda c, f: ranking(c, f) + 0.01, R),
    "returns (N, K)": (lambda c, f: ranking(c, f)[:, None].expand_as(c), {}),
    "random": (lambda c, f: ranking(c, f) + 1e-6 * torch.rand(()), {}),
    "s-dpo of the last one": (lambda c, f: first(c.flip(1), f.flip(1)), {"monotone": True}),
    "s-dpo with the second alone": (lambda c, f: first(c[:, :2], f[:, :2]), {"like": "s_dpo"}),
    "s-dpo with a mean of the others": (lambda c, f: softplus(torch.logsumexp(BETA * (c - f)[:, 1:], 1) - math.log(c.shape[1] - 1) - BETA * (c - f)[:, 0]), {"like": "s_dpo"}),
    "s-dpo, the order of the others matters": (lambda c, f: first(c, f) + 1e-3 * BETA * ((c - f)[:, 1] - (c - f)[:, -1]), {"any_order": True}),
    "counts not read": (lambda c, f, n: ranking(c, f), COUNTS),
    "counts one too many": (lambda c, f, n: masked(c, f, n + 1), COUNTS),
    "counts one too few": (lambda c, f, n: masked(c, f, n - 1), COUNTS),
    "count of the first list for all": (lambda c, f, n: masked(c, f, n[:1].expand_as(n)), COUNTS),
    "count of the longest list for all": (lambda c, f, n: masked(c, f, n.amax().expand_as(n)), COUNTS),
    "absent ones at 0": (lambda c, f, n: ranking(c * (torch.arange(c.shape[1]) < n[:, None]), f * (torch.arange(c.shape[1]) < n[:, None])) * (1 + 0 * n), {**COUNTS, "like": "plackett_luce"}),
    "a trace of the absent ones": (lambda c, f, n: masked(c, f, n) + 1e-7 * (c - f)[:, -1] * (n < c.shape[1]), COUNTS),
    "counts changed": (lambda c, f, n: masked(c, f, n.clamp_(max=2)), COUNTS),
    "scores not read": (lambda c, f, s: ranking(c, f), SCORES),
    "scores of the neighbour": (lambda c, f, s: nca(c, f, s.roll(1, 1)), SCORES),
    "scores of another list": (lambda c, f, s: nca(c, f, s.roll(1, 0)), SCORES),
    "scores negated": (lambda c, f, s: nca(c, f, -s), NCA),
    "scores without their softmax": (lambda c, f, s: (s * softplus(-BETA * (c - f))).sum(1), NCA),
    "softmax of scores over the batch": (lambda c, f, s: (torch.softmax(s, 0) * softplus(-BETA * (c - f))).sum(1), SCORES),
    "scores that take the log-probs' order": (lambda c, f, s: nca(c, f, s + 1e-3 * torch.arange(s.shape[1])), SCORES),
    "nca with a whole for its K-th": (lambda c, f, s: nca(c, f, s) + softplus(BETA * (c - f)).sum(1), NCA),
    "nca with a half for its K-th": (lambda c, f, s: (torch.softmax(s, 1) * softplus(-BETA * (c - f)) + softplus(BETA * (c - f)) / 2).sum(1), NCA),
}  # fmt: skip

ALL = {
    **{f"of one: {name}": (check_unpaired_loss, *rest) for name, rest in UNPAIRED.items()},
    **{f"of a list: {name}": (check_list_loss, *rest) for name, rest in LISTS.items()},
}
