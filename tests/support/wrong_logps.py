"""Wrong functions of logits and a table, each one edit away from a plain gather."""

import math

import torch
from wrong_losses import Buffered


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


def one_on_nothing(logits, table):
    lengths = table.lengths.reshape(-1)
    return scored(logits, table) - 1e-6 * (lengths == 0)


LOG_PROBS = {
    "not 0 without a token": one_on_nothing,
    "noise of an ulp": lambda z, t: scored(z, t) * (1 + 2.0**-22 * torch.rand(())),
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


class Changed(torch.autograd.Function):
    """Numbers as they are, with their gradient changed."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient), None


class Shares(torch.autograd.Function):
    """A log-softmax that keeps the probabilities of the last call alone."""

    @staticmethod
    def forward(ctx, x):
        Shares.kept = torch.softmax(x, 1)
        return torch.log_softmax(x, 1)

    @staticmethod
    def backward(ctx, g):
        return g - Shares.kept[: len(g), : g.shape[1]] * g.sum(1, keepdim=True)


class BufferedBackward(torch.autograd.Function):
    """Gives what it gets; its gradient comes in a buffer that it keeps."""

    @staticmethod
    def forward(ctx, x, buffers):
        ctx.buffers = buffers
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return ctx.buffers.setdefault(g.shape, torch.empty(g.shape)).copy_(g), None


def above(change):
    """What comes from above is changed."""
    return lambda z, t: Changed.apply(scored(z, t), change)


def below(change):
    """The gradient of the logits is changed."""
    return lambda z, t: scored(Changed.apply(z, change), t)


def where(asked, change=lambda x: x + 1e-3):
    """Wrong for the tables and logits of which `asked` holds."""
    return lambda z, t: change(scored(z, t)) if asked(z, t) else scored(z, t)


def kept(edit):
    """`edit` of (rows, targets, logits, weights), which are scored and in the table's order."""
    return lambda z, t: scored(z, t, edit)


def gather(z, t, log_softmax=lambda x: torch.log_softmax(x, -1), total=None, weight=lambda w: w):
    """Log-probs with a log-softmax of one's own."""
    keep = t.targets != -100
    w = torch.ones(len(keep)) if t.weights is None else t.weights
    keep = keep & (w != 0)
    sequence = torch.bucketize(torch.arange(len(keep)), t.seq_offsets[1:].long(), right=True)[keep]
    logps = log_softmax(z[t.logit_rows[keep]].float()).gather(1, t.targets[keep].long()[:, None])[
        :, 0
    ]
    logps = logps * weight(w[keep])
    if total is not None:
        return total(logps, sequence, t)
    return torch.zeros(t.n_sequences).index_add(0, sequence, logps)


def online(block, rescale=True, whole=True, later=True):
    """An online softmax, a block of the vocabulary at a time."""

    def log_softmax(x):
        V = x.shape[1]
        m, s = x.new_full(x.shape[:1], -torch.inf), x.new_zeros(x.shape[0])
        end = V if whole else max(V - V % block, min(V, block))
        for start in range(0, end, block):
            part = x[:, start : start + block]
            top = torch.maximum(m, part.detach().amax(1)) if later or start == 0 else m
            shift = torch.where(top == -torch.inf, 0.0, top)
            s = (s * torch.exp(m - shift) if rescale else s) + torch.exp(part - shift[:, None]).sum(
                1
            )
            m = top
        return x - m[:, None] - s.log()[:, None]

    return lambda z, t: gather(z, t, log_softmax)


def of_softmax(log_softmax):
    return lambda z, t: gather(z, t, log_softmax)


def dense(z):
    return torch.as_strided(z, z.shape, (z.shape[1], 1), z.storage_offset())


def running(logps, sequence, t):
    """Differences of one running sum in float32."""
    sums = torch.cat((torch.zeros(1), logps.cumsum(0)))
    counts = torch.bincount(sequence, minlength=t.n_sequences)
    ends = counts.cumsum(0)
    return sums[ends] - sums[ends - counts]


def in_bfloat16(logps, sequence, t):
    out = torch.zeros(t.n_sequences, dtype=torch.bfloat16)
    return out.index_add(0, sequence, logps.bfloat16()).float()


def lost_beyond(count):
    """A sequence's tokens beyond `count` are lost."""

    def total(logps, sequence, t):
        first = torch.cat(
            (
                torch.zeros(1).long(),
                torch.bincount(sequence, minlength=t.n_sequences).cumsum(0)[:-1],
            )
        )
        place = torch.arange(len(sequence)) - first[sequence]
        return torch.zeros(t.n_sequences).index_add(0, sequence, logps * (place < count))

    return lambda z, t: gather(z, t, total=total)


def last_of_each_lost(logps, sequence, t):
    last = torch.ones(len(sequence), dtype=torch.bool)
    last[:-1] = sequence[1:] != sequence[:-1]
    alone = torch.bincount(sequence, minlength=t.n_sequences)[sequence] == 1
    return torch.zeros(t.n_sequences).index_add(0, sequence, logps * (~last | alone))


def offsets_as_lengths(z, t):
    """The first sequence is right, so are all where every one has its length."""
    sizes = t.seq_offsets[1:] - t.seq_offsets[:-1]
    return gather(z, t) * (1 + 1e-3 * (sizes == 0).any())


def remembers(key):
    answers = {}

    def function(z, t):
        got = scored(z, t)
        held = answers.setdefault(key(z, t), got.detach().clone())
        return got - got.detach() + held if held.shape == got.shape else got

    return function


def changes_logits(z, t):
    with torch.no_grad():
        z.sub_(z.amax(1, keepdim=True).nan_to_num(0.0))
    return scored(z, t)


def changes_logits_behind(z, t):
    z.data[t.logit_rows] = torch.log_softmax(z.data[t.logit_rows].float(), -1).to(z.dtype)
    return scored(z, t)


def changes_targets(z, t):
    t.targets.clamp_(min=0)
    return scored(z, t)


def changes_weights(z, t):
    if t.weights is not None:
        t.weights.abs_()
    return scored(z, t)


def lost_column(k):
    def log_softmax(x):
        other = x.clone()
        if x.shape[1] > abs(k) + 1:
            other[:, k] = -torch.inf
        return x - other.logsumexp(1, keepdim=True)

    return of_softmax(log_softmax)


def in_chunks(rows, edge):
    """Rows in chunks, of which the last row is taken `edge` times."""

    def edit(r, y, x, w):
        factor = torch.ones(len(r))
        factor[rows - 1 :: rows] = edge
        return r, y, x, w * factor

    return kept(edit)


KERNELS = {
    # vocabularies
    "online softmax, blocks of 256, not rescaled": online(256, rescale=False),
    "online softmax, blocks of 1024, not rescaled": online(1024, rescale=False),
    "online softmax, blocks of 4096, not rescaled": online(4096, rescale=False),
    "online softmax, blocks of 1024, its tail lost": online(1024, whole=False),
    "online softmax, blocks of 4096, its tail lost": online(4096, whole=False),
    "online softmax, blocks of 32, its tail lost": online(32, whole=False),
    "online softmax, the maximum of the first block": online(1024, later=False),
    "the maximum of the first 1024": of_softmax(lambda x: x - x[:, :1024].amax(1, keepdim=True) - torch.exp(x - x[:, :1024].amax(1, keepdim=True)).sum(1, keepdim=True).log()),
    "no maximum beyond 4096": of_softmax(lambda x: torch.log_softmax(x, 1) if x.shape[1] <= 4096 else x - x.exp().sum(1, keepdim=True).log()),
    "no maximum at all": of_softmax(lambda x: x - x.exp().sum(1, keepdim=True).log()),
    "the mean for the maximum": of_softmax(lambda x: x - x.mean(1, keepdim=True) - torch.exp(x - x.mean(1, keepdim=True)).sum(1, keepdim=True).log()),
    "a maximum of at least 0": of_softmax(lambda x: x - x.amax(1, keepdim=True).relu() - torch.exp(x - x.amax(1, keepdim=True).relu()).sum(1, keepdim=True).log()),
    "logits within 1e4": of_softmax(lambda x: torch.log_softmax(x.clamp(-1e4, 1e4), 1)),
    "logits at most 50": of_softmax(lambda x: torch.log_softmax(x.clamp(max=50), 1)),
    "logits at least -100 below the maximum": of_softmax(lambda x: torch.log_softmax(torch.maximum(x, x.amax(1, keepdim=True) - 100), 1)),
    "log-probs at least -100": of_softmax(lambda x: torch.log_softmax(x, 1).clamp(min=-100)),
    "log-probs at most -1e-4": of_softmax(lambda x: torch.log_softmax(x, 1).clamp(max=-1e-4)),
    "probabilities and 1e-8": of_softmax(lambda x: torch.log(torch.softmax(x, 1) + 1e-8)),
    "logsumexp of an offset": of_softmax(lambda x: x - torch.logsumexp(x, 1, keepdim=True)),
    "log of a softmax": of_softmax(lambda x: torch.log(torch.softmax(x, 1))),
    "-inf as the lowest number": of_softmax(lambda x: torch.log_softmax(x.nan_to_num(0.0, neginf=-60.0), 1)),
    "the first column lost": lost_column(0),
    "the last column lost": lost_column(-1),
    "column 1024 lost": lost_column(1024),
    "column 4096 lost": lost_column(4096),
    "wrong for a vocabulary of 1": where(lambda z, t: z.shape[1] == 1),
    "wrong for an even vocabulary": where(lambda z, t: z.shape[1] % 2 == 0),
    "wrong beyond 1024": where(lambda z, t: z.shape[1] > 1024),
    "wrong beyond 4096": where(lambda z, t: z.shape[1] > 4096),
    "target 0 taken for padding": kept(lambda r, y, x, w: (r, y, x, w * (y != 0))),
    "the last id taken for padding": kept(lambda r, y, x, w: (r, y, x, w * (y != x.shape[1] - 1))),
    "targets within 1023": kept(lambda r, y, x, w: (r, y.clamp(max=1023), x, w)),
    "targets in int8": kept(lambda r, y, x, w: (r, y % 128, x, w)),
    "targets in 12 bits": kept(lambda r, y, x, w: (r, y % 4096, x, w)),
    # tables
    "rows in the order of their number": kept(lambda r, y, x, w: (r.sort().values, y, x, w)),
    "rows counted from the first": kept(lambda r, y, x, w: (torch.arange(len(r)), y, x, w)),
    "sequences of one token wrong": where(lambda z, t: bool((t.lengths.reshape(-1) == 1).any())),
    "wrong where a sequence is empty": offsets_as_lengths,
    "wrong where none is empty": where(lambda z, t: bool((t.lengths.reshape(-1) > 0).all())),
    "NaN where nothing is scored": lambda z, t: scored(z, t) / (1 if t.n_tokens else 0),
    "-0 and a mean for empty sequences": lambda z, t: scored(z, t) * t.lengths.reshape(-1).clamp(min=1) / t.lengths.reshape(-1),
    "the last sequence not filled": lambda z, t: torch.cat((scored(z, t)[:-1], 0 * scored(z, t)[-1:])),
    "the last token of a sequence lost": lambda z, t: gather(z, t, total=last_of_each_lost),
    "the first token of a table lost": kept(lambda r, y, x, w: (r, y, x, w * (torch.arange(len(r)) > 0))),
    "the last token of a table lost": kept(lambda r, y, x, w: (r, y, x, w * (torch.arange(len(r)) < len(r) - 1))),
    "tokens beyond 1024 of a sequence lost": lost_beyond(1024),
    "tokens beyond 32768 of a sequence lost": lost_beyond(2**15),
    "tokens beyond 65536 of a sequence lost": lost_beyond(2**16),
    "one row in 16 twice": in_chunks(16, 2),
    "one row in 32 left out": in_chunks(32, 0),
    "one row in 4096 left out": in_chunks(4096, 0),
    "a sequence of two thirds": lambda z, t: scored(z, t) * (1 - 1e-3 * (t.n_sequences == 4)),
    "wrong from ten sequences on": where(lambda z, t: t.n_sequences >= 10),
    "a row for every sequence": lambda z, t: scored(z, t) * (1 if len(z) >= t.n_sequences else 1.01),
    "sums in float32, differences of one": lambda z, t: gather(z, t, total=running),
    "sums in bfloat16": lambda z, t: gather(z, t, total=in_bfloat16),
    "(S, 1) twice": lambda z, t: scored(z, t)[:, None].expand(-1, 2),
    # weights
    "negative weights taken as positive": lambda z, t: gather(z, t, weight=torch.abs),
    "negative weights taken as 0": lambda z, t: gather(z, t, weight=torch.relu),
    "weights above 2 cut": lambda z, t: gather(z, t, weight=lambda w: w.clamp(max=2)),
    "weights above 1 cut": lambda z, t: gather(z, t, weight=lambda w: w.clamp(max=1)),
    "weights rounded up": lambda z, t: gather(z, t, weight=torch.ceil),
    "weights that add up to the tokens": lambda z, t: gather(z, t, weight=lambda w: w * len(w) / w.sum() if w.sum() > 0 else w),
    "weights of the first token for all": lambda z, t: gather(z, t, weight=lambda w: w[:1].expand_as(w)),
    "weights in the order of rows": lambda z, t: gather(z, t, weight=lambda w: w.flip(0)),
    "weights without a gradient": lambda z, t: gather(z, t).detach() + (g := gather(z, t, weight=torch.ones_like)) - g.detach(),
    "weights on both passes": lambda z, t: gather(z, t).detach() + (g := gather(z, t, weight=torch.square)) - g.detach(),
    "gradient by the absolute weight": lambda z, t: gather(z, t).detach() + (g := gather(z, t, weight=torch.abs)) - g.detach(),
    # what comes from above
    "absolute upstream": above(torch.abs),
    "upstream not above 0": above(lambda g: g.clamp(max=0)),
    "upstream within 1": above(lambda g: g.clamp(-1, 1)),
    "upstream within 16": above(lambda g: g.clamp(-16, 16)),
    "upstream below 1e-4 dropped": above(lambda g: g * (g.abs() > 1e-4)),
    "upstream within 1000": above(lambda g: g.clamp(-1000, 1000)),
    "upstream of the first for all": above(lambda g: g[:1].expand_as(g)),
    "upstream's mean": above(lambda g: g.mean().expand_as(g)),
    "upstream of the sequence before": above(lambda g: g.roll(1)),
    "upstream, its stride not read": above(lambda g: g if g.stride() == (1,) else torch.cat((g[:1], 0 * g[1:]))),
    "upstream in bfloat16, 1 % off": above(lambda g: g * 1.01),
    "upstream below 0 alone is 0.1 % off": above(lambda g: torch.where(g < 0, g * 1.001, g)),
    "upstream of exactly -2 doubled": above(lambda g: torch.where(g == -2, 2 * g, g)),
    # gradients
    "gradient in bfloat16": below(lambda g: g.bfloat16().to(g.dtype)),
    "gradient below 1e-4 dropped": below(lambda g: g * (g.abs() > 1e-4)),
    "gradient within 0.5": below(lambda g: g.clamp(-0.5, 0.5)),
    "gradient of the last column dropped": below(lambda g: torch.cat((g[:, :-1], 0 * g[:, -1:]), 1)),
    "gradient beyond 1024 dropped": below(lambda g: torch.cat((g[:, :1024], 0 * g[:, 1024:]), 1)),
    "gradient beyond 4096 dropped": below(lambda g: torch.cat((g[:, :4096], 0 * g[:, 4096:]), 1)),
    "gradient of row 0 dropped": below(lambda g: torch.cat((0 * g[:1], g[1:]))),
    "gradient of the last row dropped": below(lambda g: torch.cat((g[:-1], 0 * g[-1:]))),
    "gradient of the row after": below(lambda g: g.roll(1, 0)),
    "gradient flipped": below(lambda g: g.flip(1)),
    "gradient of the mean row": below(lambda g: g - g.mean() * 0 + g.mean(1, keepdim=True) * 1e3),
    "gradient 0.01 % long": below(lambda g: g * 1.0001),
    "gradient plus a trace": below(lambda g: g + 1e-6 * (g != 0)),
    "NaN gradient for an upstream of 0": above(lambda g: g * (g / g)),
    "a trace of gradient everywhere": below(lambda g: g + 1e-7),
    "a gradient without an upstream": below(lambda g: g + 1e-7 * (g.abs().sum() == 0)),
    "gradient through the maximum twice": of_softmax(lambda x: torch.log_softmax(x, 1) + x.amax(1, keepdim=True) - x.amax(1, keepdim=True).detach()),
    "gradient of the softmax alone": of_softmax(lambda x: torch.log_softmax(x, 1).detach() + (-torch.logsumexp(x, 1, keepdim=True) - (-torch.logsumexp(x, 1, keepdim=True)).detach())),
    # memory
    "strides not read": lambda z, t: scored(dense(z), t),
    "column stride not read": lambda z, t: scored(torch.as_strided(z, z.shape, (z.stride(0), 1), z.storage_offset()), t),
    "row stride not read": lambda z, t: scored(torch.as_strided(z, z.shape, (z.shape[1], z.stride(1)), z.storage_offset()) if z.stride(1) == 1 else z, t),
    "offset not read": lambda z, t: scored(torch.as_strided(z, z.shape, z.stride(), 0), t),
    "wrong where columns come first": where(lambda z, t: z.stride(0) == 1 and z.shape[0] > 1),
    "contiguous logits alone": lambda z, t: scored(z.view(-1).view(z.shape), t),
    "gradient of strided logits wrong": lambda z, t: scored(z if z.is_contiguous() else Changed.apply(z, lambda g: g * 1.01), t),
    "reads rows that nothing scores": lambda z, t: scored(z, t) + 0 * z.sum(),
    "a maximum over all rows": lambda z, t: scored(z - z.detach().amax(), t),
    "changes the logits": changes_logits,
    "changes the logits behind autograd": changes_logits_behind,
    "changes the targets": changes_targets,
    "changes the weights": changes_weights,
    # the same question again
    "answer kept by shape": remembers(lambda z, t: (z.shape, t.n_tokens)),
    "answer kept by address": remembers(lambda z, t: z.data_ptr()),
    "one buffer for all its answers": lambda z, t, kept={}: Buffered.apply(scored(z, t), kept),
    "one memory for all its gradients": lambda z, t: gather(z, t, Shares.apply),
    "one buffer for all its gradients": lambda z, t, kept={}: scored(BufferedBackward.apply(z, kept), t),
    "another one without gradients": lambda z, t: scored(z, t) * (1 if torch.is_grad_enabled() else 1.01),
    "random by an ulp": lambda z, t: scored(z, t) * (1 + 2.0**-23 * torch.randint(0, 3, ()).item()),
    "raises for one row": lambda z, t: scored(z, t) if len(z) > 1 else [][0],
    "raises where nothing is scored": lambda z, t: scored(z, t) if t.n_tokens else [][0],
    "returns a list": lambda z, t: scored(z, t).tolist(),
    "returns their sum": lambda z, t: scored(z, t).sum(),
}  # fmt: skip

ALL = {name: (function, {}) for name, function in {**LOG_PROBS, **KERNELS}.items()}
