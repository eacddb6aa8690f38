"""Right functions of every kind that are written in an unusual way, and the check that accepts each."""

import functools
import math
from types import SimpleNamespace

import numpy as np
import torch
import wrong_collators
import wrong_groups
import wrong_logps
import wrong_losses
from collators import collate_packed, collate_trl
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    logsigmoid,
    softplus,
)
from torch.utils.checkpoint import checkpoint
from wrong_collators import laid, table_like
from wrong_losses import BETA, FREE, M, average, dpo, margin

from dpo_ext.testing import (
    check_layouts,
    check_list_loss,
    check_logps,
    check_loss_invariants,
    check_unpaired_loss,
)
from dpo_ext.torch import ScoreTable


class InNumPy(torch.autograd.Function):
    """DPO in NumPy, value and gradient; once differentiable."""

    @staticmethod
    def forward(ctx, logps, ref):
        c, f = logps.detach().numpy(), ref.numpy()
        m = BETA * ((c - f) @ np.array([1, -1], dtype=c.dtype))
        ctx.slope = 0.5 * (1 + np.tanh(-m / 2)) * BETA
        return torch.from_numpy(np.logaddexp(0, -m))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        pull = -ctx.slope * upstream.numpy()
        return torch.from_numpy(np.stack((pull, -pull), 1)).to(upstream.dtype), None


class Loss(torch.nn.Module):
    """Keeps count, a parameter and a buffer; none of them changes its answer."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.register_buffer("sides", torch.tensor([1.0, -1.0]))

    def forward(self, logps, ref_logps):
        self.calls += 1
        return -logsigmoid(BETA * (logps - ref_logps) @ self.sides.to(logps.dtype))


def in_place(logps, ref_logps):
    x = (logps - ref_logps).clone()
    x[:, 1].neg_()
    return softplus(x.sum(1).mul_(-BETA))


def as_classes(logps, ref_logps):
    x = BETA * (logps - ref_logps)
    return cross_entropy(x, torch.zeros(len(x), dtype=torch.long), reduction="none")


def by_pairs(logps, ref_logps):
    return torch.stack([dpo(logps[i : i + 1], ref_logps[i : i + 1])[0] for i in range(len(logps))])


def in_parts(logps, ref_logps):
    parts = zip(logps.split(2), ref_logps.split(2), strict=True)
    return torch.cat([dpo(c, f) for c, f in parts])


def sorted_and_back(logps, ref_logps):
    order = margin(logps, ref_logps).detach().argsort()
    return dpo(logps[order], ref_logps[order])[order.argsort()]


def checkpointed(logps, ref_logps):
    return checkpoint(dpo, logps, ref_logps, use_reentrant=False)


def attached(logps, ref_logps):
    """A value of one's own with a gradient of one's own."""
    m = margin(logps, ref_logps)
    slope = -BETA * torch.sigmoid(-BETA * m.detach())
    surrogate = slope * (m - m.detach())
    return dpo(logps.detach(), ref_logps) + surrogate


def mapped(logps, ref_logps):
    def one(c, f):
        return -logsigmoid(BETA * ((c[0] - f[0]) - (c[1] - f[1])))

    return torch.vmap(one)(logps, ref_logps)


def two_branches(logps, ref_logps):
    x = BETA * margin(logps, ref_logps)
    high = x > 0
    there = torch.log1p(torch.exp(-torch.where(high, x, 0)))
    here = torch.log1p(torch.exp(torch.where(high, 0, x))) - x
    return torch.where(high, there, here)


def refuses_empty(logps, ref_logps, lengths):
    if bool((lengths == 0).any()):
        raise ValueError("an empty completion has no average")
    return wrong_losses.simpo(logps, lengths)


def guarded_odds(logps, ref_logps, lengths):
    a = average(logps, lengths).clamp(max=-1e-7)
    odds = a - torch.log(-torch.expm1(a))
    return -a[:, 0] - 0.1 * logsigmoid(odds[:, 0] - odds[:, 1])


def dpop(logps, ref_logps):
    worse = (ref_logps - logps)[:, 0].relu()
    return -logsigmoid(BETA * (margin(logps, ref_logps) - 5 * worse))


PAIRS = {
    "float64 inside": (lambda c, f: dpo(c.double(), f.double()).to(c.dtype), M),
    "in place on its own": (in_place, M),
    "in NumPy, with its own gradient": (InNumPy.apply, M),
    "a module with a state": (Loss(), M),
    "a bound partial": (functools.partial(lambda c, f, beta: dpo(c * beta, f * beta), beta=1.0), M),
    "an option of its own": (lambda logps, ref_logps, *, beta=BETA: dpo(logps, ref_logps) * (beta / BETA), M),
    "softplus": (lambda c, f: softplus(-BETA * margin(c, f)), M),
    "logaddexp": (lambda c, f: torch.logaddexp(torch.zeros_like(c[:, 0]), -BETA * margin(c, f)), M),
    "cross entropy of two": (as_classes, M),
    "binary cross entropy": (lambda c, f: binary_cross_entropy_with_logits(BETA * margin(c, f), torch.ones_like(c[:, 0]), reduction="none"), M),
    "two branches, each safe": (two_branches, M),
    "einsum": (lambda c, f: softplus(-BETA * torch.einsum("ns,s->n", c - f, c.new_tensor([1.0, -1.0]))), M),
    "pair by pair": (by_pairs, M),
    "two pairs at a time": (in_parts, M),
    "sorted and back": (sorted_and_back, M),
    "vmap": (mapped, M),
    "checkpointed": (checkpointed, M),
    "value and gradient apart": (attached, M),
    "a gradient in closed form": (lambda c, f: wrong_losses.WrongBackward.apply(c, f, "nothing"), M),
    "one number for one pair": (lambda c, f: dpo(c, f).squeeze(), M),
    "a mean": (lambda c, f: dpo(c, f).mean(), M),
    "traced into a graph": (torch.fx.symbolic_trace(lambda c, f: softplus(((c - f) * BETA).diff(dim=1)[:, 0])), M),
    "a kink that moves with the reference": (dpop, {"monotone": True, "step0": math.log(2)}),
    "a hinge": (lambda c, f: (1 - BETA * margin(c, f)).relu(), {"only_margin": True, "monotone": True, "convex": True}),
    "a kink on both sides": (lambda c, f: (BETA * (c - f)).abs().sum(1), {"step0": 0.0, "convex": True}),
    "an exponential": (lambda c, f: torch.exp(-margin(c, f)), {"only_margin": True, "monotone": True, "finite_up_to": 150}),
    "a bounded one": (lambda c, f: torch.tanh(-margin(c, f)), {"only_margin": True, "monotone": True, "bounds": (-1, 1)}),
    "negative values": (lambda c, f: -margin(c, f), {"only_margin": True, "monotone": True, "step0": 0.0}),
    "one side alone": (lambda c, f: softplus(-BETA * (c - f)[:, 0]), {"monotone": "c"}),
    "the reference of one side": (lambda c, f: softplus(-BETA * (c[:, 0] - c[:, 1] - f[:, 0])), {"one_sided": True}),
    "no reference": (lambda c, f: -c[:, 0], {"reference_free": True, "monotone": True}),
    "the batch's own baseline": (lambda c, f: softplus(-BETA * (margin(c, f) - margin(c, f).mean())), {"couples_batch": True, "only_margin": True}),
    "empty completions refused": (refuses_empty, {**FREE, "only_averages": False}),
    "odds with a guard": (guarded_odds, FREE),
    "averages of at least one token": (lambda c, f, n: wrong_losses.ipo_avg(c, f, n), {"needs_lengths": True, "only_margin": False}),
    "a length that is added": (lambda c, f, n: softplus(-BETA * margin(c, f) + 0.01 * (n[:, 0] - n[:, 1])), {"needs_lengths": True, "only_margin": True}),
}  # fmt: skip


def split_and_back(c, f, labels):
    out = torch.zeros_like(c)
    out = out.index_put((labels.nonzero()[:, 0],), torch.sigmoid(-BETA * (c - f)[labels]))
    return out.index_put(((~labels).nonzero()[:, 0],), torch.sigmoid(BETA * (c - f)[~labels]))


def by_sign(c, f, labels):
    return torch.sigmoid((1 - 2 * labels.to(c.dtype)) * BETA * (c - f))


SINGLE = {
    "labels as signs": (by_sign, wrong_groups.KTO),
    "split and put back": (split_and_back, wrong_groups.KTO),
    "a mean": (lambda c, f, y: by_sign(c, f, y).mean(), {"bounds": (0, 1)}),
    "labels as targets": (lambda c, f, y: binary_cross_entropy_with_logits(BETA * (c - f), y.to(c.dtype), reduction="none"), {"step0": math.log(2)}),
    "weights of its own": (lambda c, f, y: by_sign(c, f, y) * torch.where(y, 1.0, 1.5).to(c.dtype), {}),
    "the batch's own baseline": (
        lambda c, f, y: by_sign(c, f + (c - f).mean(), y),
        {"couples_batch": True, "monotone": False},
    ),
}  # fmt: skip


def suffixes(c, f):
    x = (BETA * (c - f)).flip(1)
    return (torch.logcumsumexp(x, 1) - x).sum(1)


def without_the_absent(c, f, counts):
    rows = [
        wrong_groups.ranking(c[i : i + 1, :n], f[i : i + 1, :n])[0]
        for i, n in enumerate(counts.tolist())
    ]
    return torch.stack(rows)


LISTS = {
    "sums of suffixes": (suffixes, {**wrong_groups.R, "like": "plackett_luce"}),
    "a mean": (lambda c, f: suffixes(c, f).mean(), wrong_groups.R),
    "list by list": (without_the_absent, {**wrong_groups.COUNTS, "like": "plackett_luce"}),
    "masked": (wrong_groups.masked, {**wrong_groups.COUNTS, "like": "plackett_luce"}),
    "the first against the others": (wrong_groups.first, {"like": "s_dpo", "any_order": True, "monotone": True}),
    "scored": (wrong_groups.nca, wrong_groups.NCA),
}  # fmt: skip


def scored_tokens(table):
    """Rows, targets, weights and sequence of the tokens that count."""
    compact = table.compact()
    weights = torch.ones(len(compact.targets)) if compact.weights is None else compact.weights
    sizes = compact.seq_offsets.diff().long()
    sequence = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    parts = compact.logit_rows, compact.targets.long(), weights, sequence
    return tuple(part[weights != 0] for part in parts)


def per_sequence(logits, table):
    rows, targets, weights, sequence = scored_tokens(table)
    out = []
    for i in range(table.n_sequences):
        own = sequence == i
        logp = torch.log_softmax(logits[rows[own]].float(), 1).gather(1, targets[own, None])[:, 0]
        out.append((logp * weights[own]).sum())
    return torch.stack(out)


def by_cross_entropy(logits, table):
    rows, targets, weights, sequence = scored_tokens(table)
    logp = -cross_entropy(logits[rows].float(), targets, reduction="none") * weights
    return torch.zeros(table.n_sequences).index_add(0, sequence, logp)


def by_logsumexp(x):
    x = x - x.detach().amax(1, keepdim=True)
    return x - torch.logsumexp(x, 1, keepdim=True)


def in_float64(logits, table):
    return wrong_logps.gather(
        logits.double(), table, lambda x: torch.log_softmax(x.double(), 1).float()
    )


def in_place_inside(x):
    y = x.clone()
    y -= y.detach().amax(1, keepdim=True)
    return y - y.exp().sum(1, keepdim=True).log()


class OwnGradient(torch.autograd.Function):
    """A log-softmax that keeps probabilities and writes its gradient over them."""

    @staticmethod
    def forward(ctx, x):
        logps = torch.log_softmax(x, 1)
        ctx.save_for_backward(logps)
        return logps.clone()

    @staticmethod
    def backward(ctx, upstream):
        (logps,) = ctx.saved_tensors
        mass = logps.exp()
        return mass.mul_(upstream.sum(1, keepdim=True)).neg_().add_(upstream)


def two_sides(logits, table):
    return (
        wrong_logps.gather(logits, table).reshape(-1, 2)
        if table.n_sequences % 2 == 0
        else wrong_logps.gather(logits, table)
    )


LOGPS = {
    "sequence by sequence": per_sequence,
    "cross entropy": by_cross_entropy,
    "logsumexp": lambda z, t: wrong_logps.gather(z, t, by_logsumexp),
    "float64 inside": in_float64,
    "in place on its own": lambda z, t: wrong_logps.gather(z, t, in_place_inside),
    "a gradient of its own": lambda z, t: wrong_logps.gather(z, t, OwnGradient.apply),
    "an online softmax": wrong_logps.online(256),
    "checkpointed": lambda z, t: checkpoint(wrong_logps.gather, z, t, use_reentrant=False),
    "(S / 2, 2)": two_sides,
    "a table without what is not scored": lambda z, t: wrong_logps.gather(z, t.compact()),
}  # fmt: skip


def between(rows):
    """Pads, masked, between a prompt and its completion, with position ids that skip them."""
    longest = max(max(len(r["prompt_ids"]), 1) for r in rows)
    sides = [(r["prompt_ids"], r[k]) for k in ("chosen_ids", "rejected_ids") for r in rows]
    T = longest + max(len(c) for _, c in sides)
    ids = torch.zeros(len(sides), T, dtype=torch.int64)
    mask, labels, at = ids.clone(), ids - 100, ids.clone()
    if any(not len(p) for p, _ in sides):
        raise ValueError("an empty prompt")
    for i, (p, c) in enumerate(sides):
        places = torch.tensor([*range(len(p)), *range(longest, longest + len(c))])
        ids[i, places] = torch.tensor([*p.tolist(), *c.tolist()])
        mask[i, places] = 1
        at[i, places] = torch.arange(len(places))
        labels[i, places[len(p) :]] = torch.tensor(c).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": at}
    table = ScoreTable.from_labels(labels)
    before = torch.arange(len(sides) * T).reshape(-1, T)
    last = torch.tensor([len(p) for p, _ in sides]) - 1
    moved = table.logit_rows.clone()
    for i in range(len(sides)):
        moved[table.logit_rows == before[i, longest - 1]] = before[i, last[i]]
    return inputs, table_like(table, logit_rows=moved)


def added(mask):
    """A mask of (B, 1, T, T) that is added to the scores."""
    T = mask.shape[1]
    seen = torch.ones(T, T, dtype=torch.bool).tril() & (mask != 0)[:, None]
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]


def sides_in_pairs(rows):
    """Chosen and rejected of a pair after one another, the table in that order."""
    inputs, table = collate_packed(rows)
    ids, at = inputs["input_ids"], inputs["position_ids"]
    return SimpleNamespace(model_inputs={"input_ids": ids, "position_ids": at}, table=table)


def refuses_empty_prompts(rows):
    if any(not len(r["prompt_ids"]) for r in rows):
        raise ValueError("a prompt must not be empty")
    return collate_trl(rows)


with_masks = wrong_collators.edited(
    lambda i, t, _: ({**i, "attention_mask": added(i["attention_mask"])}, t)
)
COLLATORS = {
    "padded on the left": lambda rows: collate_trl(rows, "left"),
    "padded to a multiple of 8": lambda rows: laid(rows, extra=5),
    "padded with an ordinary id": lambda rows: laid(rows, pad=3),
    "somewhere in its row": lambda rows: laid(rows, extra=3, place=lambda i, T, n: (T - n) // 2),
    "pads between prompt and completion": between,
    "a mask that is added": with_masks,
    "a mask of truth values": wrong_collators.edited(lambda i, t, _: ({**i, "attention_mask": i["attention_mask"].bool()}, t)),
    "blocks": wrong_collators.blocks(lambda a, b, q, k: (k <= q) & (a == b)),
    "position ids beside a mask": wrong_collators.positions(lambda at, i: at, wrong_collators.left),
    "an object for a tuple": sides_in_pairs,
    "weights of 1": wrong_collators.edited(lambda i, t, _: (i, table_like(t, weights=torch.ones(len(t.targets))))),
    "a table without what is not scored": wrong_collators.edited(lambda i, t, _: (i, t.compact())),
    "inputs that the model does not read": wrong_collators.edited(lambda i, t, _: ({**i, "token_type_ids": 0 * i["input_ids"]}, t)),
    "empty prompts refused": refuses_empty_prompts,
}  # fmt: skip

RIGHT = {
    **{f"pairs: {name}": (check_loss_invariants, *rest) for name, rest in PAIRS.items()},
    **{f"single: {name}": (check_unpaired_loss, *rest) for name, rest in SINGLE.items()},
    **{f"lists: {name}": (check_list_loss, *rest) for name, rest in LISTS.items()},
    **{f"log-probs: {name}": (check_logps, function, {}) for name, function in LOGPS.items()},
    **{f"layouts: {name}": (check_layouts, collate, {}) for name, collate in COLLATORS.items()},
}
