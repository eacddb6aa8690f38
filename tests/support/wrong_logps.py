"""Wrong functions of logits and a table, each one edit away from a plain gather."""

import math

import torch


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
