"""Wrong losses of pairs, each one edit away from a right one, and what each claims to be."""

import math

import torch
from torch.nn.functional import logsigmoid, softplus

BETA = 0.1


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
    "a saddle": (
        lambda c, f: dpo(c, f) + 1e-3 * (c - f)[:, 0] * (c - f)[:, 1],
        {"convex": True},
    ),
    "two slopes at one kink": (OneSidedKink.apply, {"only_margin": True}),
    "kto with the sides swapped": (
        lambda c, f: torch.sigmoid(BETA * (c - f)[:, 0]) + torch.sigmoid(-BETA * (c - f)[:, 1]),
        {"monotone": True},
    ),
}  # fmt: skip


class Upstream(torch.autograd.Function):
    """The loss as it is, with what comes from above changed on its way back."""

    @staticmethod
    def forward(ctx, loss, change):
        ctx.change = change
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.change(upstream), None


class Downstream(torch.autograd.Function):
    """The log-probs as they are, with their gradient changed."""

    @staticmethod
    def forward(ctx, logps, change):
        ctx.change = change
        ctx.save_for_backward(logps)
        return logps.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient, *ctx.saved_tensors), None


def above(change):
    return lambda c, f: Upstream.apply(dpo(c, f), change)


def below(change):
    return lambda c, f: dpo(Downstream.apply(c, change), f)


def when(asked, change=lambda x: x * 1.01):
    """DPO that is wrong for a batch of which `asked` holds."""
    return lambda c, f: change(dpo(c, f)) if asked(c, f) else dpo(c, f)


def where(asked, change=lambda x: x * 1.01):
    """DPO that is wrong for a pair of which `asked` holds."""
    return lambda c, f: torch.where(asked(c, f), change(dpo(c, f)), dpo(c, f))


def flat(t):
    """A tensor's memory read as if its rows stood one after the other."""
    return torch.as_strided(t, t.shape, (t.shape[1], 1), t.storage_offset())


def remembers(key):
    kept = {}

    def loss(c, f):
        return kept.setdefault(key(c), dpo(c, f).detach()) * 0 + dpo(c, f) * 0 + kept[key(c)]

    return loss


class Buffered(torch.autograd.Function):
    """Gives what it gets, in a buffer that it keeps."""

    @staticmethod
    def forward(ctx, x, buffers):
        kept = buffers.setdefault((x.shape, x.dtype), torch.empty_like(x))
        return kept.copy_(x).view_as(x)

    @staticmethod
    def backward(ctx, upstream):
        return upstream, None


class Shares(torch.autograd.Function):
    """Keeps what its backward needs for the last call alone."""

    @staticmethod
    def forward(ctx, logps, ref):
        Shares.kept = torch.sigmoid(-BETA * margin(logps, ref))
        return dpo(logps, ref)

    @staticmethod
    def backward(ctx, upstream):
        pull = -BETA * (Shares.kept if len(Shares.kept) == len(upstream) else 0) * upstream
        return torch.stack((pull, -pull), 1), None


def one_buffer():
    buffers = {}
    return lambda c, f: Buffered.apply(dpo(c, f), buffers)


def first_call_wrong():
    calls = []

    def loss(c, f):
        calls.append(1)
        return dpo(c, f) * (2 if len(calls) == 1 else 1)

    return loss


def every_seventh_call_wrong():
    calls = []

    def loss(c, f):
        calls.append(1)
        return dpo(c, f) * (1.001 if len(calls) % 7 == 0 else 1)

    return loss


def running_baseline():
    state = {"mean": 0.0}

    def loss(c, f):
        state["mean"] = 0.9 * state["mean"] + 0.1 * margin(c, f).mean().item()
        return -logsigmoid(BETA * (margin(c, f) - state["mean"]))

    return loss


def restores(c, f):
    f.data.sub_(1)
    return dpo(c, f)


def through(change):
    """DPO of the policy after `change`, of the reference as it is."""
    return lambda c, f: dpo(change(c), f)


def of_ref(change):
    return lambda c, f: dpo(c, change(f))


def at_margin(change):
    return lambda c, f: -logsigmoid(BETA * change(margin(c, f)))


ENDS = {
    # sizes of a batch
    "wrong for one pair": when(lambda c, f: len(c) == 1),
    "wrong for one pair, as a mean": when(lambda c, f: len(c) == 1, lambda x: 2 * x.mean()),
    "wrong for two pairs": when(lambda c, f: len(c) == 2),
    "wrong for three pairs": when(lambda c, f: len(c) == 3),
    "wrong for four pairs": when(lambda c, f: len(c) == 4),
    "wrong for five pairs": when(lambda c, f: len(c) == 5),
    "wrong from five pairs on": when(lambda c, f: len(c) >= 5),
    "wrong from six pairs on": when(lambda c, f: len(c) > 5),
    "wrong from 17 pairs on": when(lambda c, f: len(c) > 16),
    "wrong from 33 pairs on": when(lambda c, f: len(c) > 32),
    "wrong for an odd number of pairs": when(lambda c, f: len(c) % 2 == 1),
    "the last pair of an odd number left out": lambda c, f: dpo(c, f)[: max(len(c) // 2 * 2, 1)].mean(),
    "the last pair left out": lambda c, f: dpo(c, f)[:-1].mean() if len(c) > 1 else dpo(c, f),
    "the last pair of a batch doubled": lambda c, f: torch.cat((dpo(c, f)[:-1], dpo(c, f)[-1:] * (1 + (len(c) > 1)))),
    "an unbiased mean": lambda c, f: dpo(c, f).sum() / max(len(c) - 1, 1),
    "mean over two at least": lambda c, f: dpo(c, f).sum() / max(len(c), 2),
    "mean over four at most": lambda c, f: dpo(c, f).sum() / min(len(c), 4),
    "every pair against every other": lambda c, f: -logsigmoid(BETA * ((c - f)[:, :1] - (c - f)[None, :, 1])).mean(1),
    "the chosen one against the rejected one of the pair before": lambda c, f: -logsigmoid(BETA * ((c - f)[:, 0] - (c - f)[:, 1].roll(1))),
    "margins divided by their deviation": lambda c, f: -logsigmoid(BETA * margin(c, f) / (1 + margin(c, f).detach().std(correction=0))),
    "weighted by the margin": lambda c, f: (dpo(c, f) * torch.softmax(margin(c, f).detach(), 0)).sum(),
    "sorted": lambda c, f: dpo(c, f).sort().values,
    "reversed": lambda c, f: dpo(c, f).flip(0),
    "summed as it goes": lambda c, f: dpo(c, f).cumsum(0) / torch.arange(1, len(c) + 1),
    "the largest": lambda c, f: dpo(c, f).max(),
    "the median": lambda c, f: dpo(c, f).median(),
    # certain log-probs
    "no gradient where the policy is certain": through(lambda c: c * (c != 0)),
    "no gradient where the chosen one is certain": through(lambda c: torch.stack((c[:, 0] * (c[:, 0] < 0), c[:, 1]), 1)),
    "half a gradient where the policy is certain": through(lambda c: torch.minimum(c, torch.zeros_like(c))),
    "pairs of a certain completion left out": lambda c, f: dpo(c, f) * (c != 0).all(1),
    "a certain log-prob taken for padding": through(lambda c: c.masked_fill(c == 0, -10.0)),
    "a certain reference taken for padding": of_ref(lambda f: f.masked_fill(f == 0, -10.0)),
    "log-probs at most -1e-3": through(lambda c: c.clamp(max=-1e-3)),
    "log-probs at most -1e-5": through(lambda c: c.clamp(max=-1e-5)),
    "reference at most -1e-3": of_ref(lambda f: f.clamp(max=-1e-3)),
    "a guard that divides": lambda c, f: dpo(c, f) * (c / c).mean(1),
    "NaN where both are certain": where(lambda c, f: (c == 0).all(1), lambda x: x * float("nan")),
    "infinite where the reference is certain": where(lambda c, f: (f == 0).any(1), lambda x: x / 0),
    "NaN where policy is reference": where(lambda c, f: (c == f).all(1), lambda x: x * float("nan")),
    "gradient NaN where policy is reference": lambda c, f: dpo(c, f) + 1e-9 * margin(c, f).square().sqrt(),
    "no gradient where policy is reference": lambda c, f: torch.where(margin(c, f) == 0, math.log(2), dpo(c, f)),
    # extreme gaps
    "margin at most 20": at_margin(lambda m: m.clamp(max=20)),
    "margin at least -20": at_margin(lambda m: m.clamp(min=-20)),
    "margin within 500": at_margin(lambda m: m.clamp(-500, 500)),
    "margin within 5000": at_margin(lambda m: m.clamp(-5000, 5000)),
    "margin within 5000, its gradient kept": at_margin(lambda m: m + (m.clamp(-5000, 5000) - m).detach()),
    "margin at least -9000": at_margin(lambda m: m.clamp(min=-9000)),
    "no gradient beyond a margin of 1000": at_margin(lambda m: torch.where(m.abs() > 1000, m.detach(), m)),
    "no gradient above a margin of 200": at_margin(lambda m: torch.where(m > 200, m.detach(), m)),
    "no gradient above a margin of 100": at_margin(lambda m: torch.where(m > 100, m.detach(), m)),
    "no gradient below a margin of -200": at_margin(lambda m: torch.where(m < -200, m.detach(), m)),
    "NaN beyond 8000": at_margin(lambda m: torch.where(m.abs() > 8000, m / 0 - m / 0, m)),
    "log-probs at least -1000": through(lambda c: c.clamp(min=-1000)),
    "log-probs at least -9990": through(lambda c: c.clamp(min=-9990)),
    "reference at least -1000": of_ref(lambda f: f.clamp(min=-1000)),
    "reference at least -9990": of_ref(lambda f: f.clamp(min=-9990)),
    "chosen reference at least -5000": of_ref(lambda f: torch.stack((f[:, 0].clamp(min=-5000), f[:, 1]), 1)),
    "probabilities of both, and their logarithm": through(lambda c: c.exp().log()),
    "ratios at most 100": lambda c, f: -logsigmoid(BETA * ((c - f).clamp(max=100)[:, 0] - (c - f).clamp(max=100)[:, 1])),
    "ratios at least -100": lambda c, f: -logsigmoid(BETA * ((c - f).clamp(min=-100)[:, 0] - (c - f).clamp(min=-100)[:, 1])),
    "a slope of the tail": lambda c, f: dpo(c, f) + 1e-4 * (margin(c, f).abs() - 3000).relu(),
    "a jump at a margin of 100": lambda c, f: dpo(c, f) + 1e-3 * (margin(c, f) > 100),
    # one column alone
    "the reference's rejected side is not read": of_ref(lambda f: torch.stack((f[:, 0], torch.zeros_like(f[:, 0])), 1)),
    "the reference's chosen side is not read": of_ref(lambda f: torch.stack((torch.zeros_like(f[:, 0]), f[:, 1]), 1)),
    "reference where it is lower": lambda c, f: dpo(c, torch.minimum(c.detach(), f)),
    "reference rounded": of_ref(lambda f: f.round()),
    "reference in float16": of_ref(lambda f: f.half().to(f.dtype)),
    "reference in bfloat16": of_ref(lambda f: f.bfloat16().to(f.dtype)),
    "reference times 0.99": of_ref(lambda f: f * 0.99),
    "rejected reference times 0.999": of_ref(lambda f: f * f.new_tensor([1, 0.999])),
    "rejected log-prob times 1.001": through(lambda c: c * c.new_tensor([1, 1.001])),
    "chosen and rejected averaged a little": through(lambda c: 0.999 * c + 0.001 * c.flip(1)),
    "two betas": lambda c, f: -logsigmoid(BETA * (c[:, 0] - c[:, 1]) - 0.11 * (f[:, 0] - f[:, 1])),
    "reference with a gradient's sign": lambda c, f: dpo(c, f) + 1e-3 * (f[:, 0] - f[:, 1]).sign(),
    # what comes from above
    "absolute upstream": above(torch.abs),
    "upstream not below 0": above(torch.relu),
    "upstream of -1 for every negative one": above(lambda g: torch.where(g < 0, -torch.ones_like(g), g)),
    "upstream's sign": above(torch.sign),
    "upstream within 1": above(lambda g: g.clamp(-1, 1)),
    "upstream within 1000": above(lambda g: g.clamp(-1e3, 1e3)),
    "upstream below 1e-4 dropped": above(lambda g: g * (g.abs() > 1e-4)),
    "upstream of the first for all": above(lambda g: g[:1].expand_as(g) if g.dim() else g),
    "upstream averaged": above(lambda g: g.mean().expand_as(g)),
    "upstream in bfloat16": above(lambda g: g.bfloat16().to(g.dtype) * (1 + 2**-9)),
    "upstream plus a trace": above(lambda g: g + 1e-6),
    "upstream of 0 is NaN": above(lambda g: g * (g / g)),
    "upstream's memory read flat": above(lambda g: torch.as_strided(g, g.shape, (1,) * g.dim()) if g.untyped_storage().nbytes() >= g.numel() * 8 else g[:1].expand_as(g) * 0),
    "upstream written to": above(lambda g: g.mul_(2) if not g.is_contiguous() or g.numel() == 1 else g * 2),
    "gradient in float32": below(lambda g, c: g.float().to(g.dtype)),
    "gradient in bfloat16": below(lambda g, c: g.bfloat16().to(g.dtype)),
    "gradient clipped": below(lambda g, c: g.clamp(-0.09, 0.09)),
    "gradient below 1e-3 dropped": below(lambda g, c: g * (g.abs() > 1e-3)),
    "gradient's norm clipped": below(lambda g, c: g / max(1.0, g.norm().item() * 5)),
    "gradient of the last pair dropped": below(lambda g, c: torch.cat((g[:-1], 0 * g[-1:]))),
    "gradient of the chosen one alone doubled": below(lambda g, c: g * g.new_tensor([2, 1])),
    "gradient turned": below(lambda g, c: g.flip(1)),
    "gradient flipped along the batch": below(lambda g, c: g.flip(0)),
    "gradient 0 at log-probs below -500": below(lambda g, c: g * (c > -500)),
    "gradient of the rejected one 0.1 % short": below(lambda g, c: g * g.new_tensor([1, 0.999])),
    # memory
    "strides not read": lambda c, f: dpo(flat(c), flat(f)),
    "strides of the reference not read": lambda c, f: dpo(c, flat(f)),
    "offset not read": lambda c, f: dpo(c, torch.as_strided(f, f.shape, f.stride(), 0)),
    "contiguous memory alone": lambda c, f: dpo(c.view(-1).view(-1, 2), f),
    "wrong for exchanged dimensions": when(lambda c, f: c.stride(0) < c.stride(1)),
    "changes the policy in place": lambda c, f: dpo(c.sub_(f), torch.zeros_like(f)),
    "changes the policy in place, then back": lambda c, f: dpo(c.add_(1).sub_(1), f),
    "writes past autograd's count": restores,
    "returns its input's memory": lambda c, f: f.data.copy_(c.data)[:, 0] * 0 + dpo(c, f),
    # the same question again
    "answer kept by shape": remembers(lambda c: c.shape),
    "answer kept by address": remembers(lambda c: c.data_ptr()),
    "wrong in its first call": first_call_wrong(),
    "wrong every seventh call": every_seventh_call_wrong(),
    "a baseline that runs": running_baseline(),
    "one buffer for all its answers": one_buffer(),
    "one memory for all its gradients": Shares.apply,
    "another one without gradients": lambda c, f: dpo(c, f) * (1 if torch.is_grad_enabled() else 1.01),
    "another one for a leaf": lambda c, f: dpo(c, f) * (1 if c.requires_grad else 1.01),
    # types
    "returns float64 always": lambda c, f: dpo(c.double(), f.double()),
    "returns None": lambda c, f: None,
    "returns a tuple": lambda c, f: (dpo(c, f), margin(c, f)),
    "returns (N, 2)": lambda c, f: dpo(c, f)[:, None].expand(-1, 2),
    "returns (1,)": lambda c, f: dpo(c, f).mean()[None],
    "raises for one pair": lambda c, f: dpo(c, f) if len(c) > 1 else [][0],
    "raises where the policy is certain": lambda c, f: 1 / 0 if bool((c == 0).any()) else dpo(c, f),
    "refuses log-probs below -9000": lambda c, f: [][0] if bool((c < -9000).any()) else dpo(c, f),
    "exponentials in float32": lambda c, f: dpo(c, f) if c.dtype == torch.float64 else torch.log1p(torch.exp(-BETA * margin(c, f))),
    "float32 alone is 0.1 % off": lambda c, f: dpo(c, f) * (1.001 if c.dtype == torch.float32 else 1),
    "gradient of float32 alone is wrong": lambda c, f: dpo(c, f) if c.dtype == torch.float64 else above(lambda g: g * 1.01)(c, f),
}  # fmt: skip


def average(c, n):
    return c / n.clamp(min=1)


def simpo(c, n):
    a = average(c, n)
    return -logsigmoid(2 * (a[:, 0] - a[:, 1]) - 0.5)


FREE = {"reference_free": True, "needs_lengths": True}
SIMPO = {**FREE, "like": "simpo", "parameters": {"beta": 2.0, "gamma": 0.5}}
IPO = {"like": "ipo_avg", "parameters": {"beta": 0.1}, "needs_lengths": True}


def ipo_avg(c, f, n, beta=0.1):
    ratios = average(c - f, n)
    return (ratios[:, 0] - ratios[:, 1] - 1 / (2 * beta)) ** 2


def like(name, **parameters):
    return {"like": name, "parameters": parameters}


OF_LENGTHS = {
    "0 / 0 for an empty completion": (lambda c, _, n: -logsigmoid(2 * (c / n) @ c.new_tensor([1.0, -1.0])), FREE),
    "infinite gradient for an empty completion": (lambda c, _, n: simpo(c, n) + 0 * (c[:, 0] / n[:, 0]), FREE),
    "NaN for two empty completions": (lambda c, _, n: simpo(c, n) * (n.sum(1) / n.sum(1)), FREE),
    "TypeError for an empty completion": (lambda c, _, n: simpo(c, n) if bool((n > 0).all()) else len(3), FREE),
    "log of a length": (lambda c, _, n: simpo(c, n) - 1e-3 * n[:, 1].to(c.dtype).log(), FREE),
    "odds of a certain completion": (
        lambda c, _, n: -average(c, n)[:, 0] - 0.1 * logsigmoid(average(c, n) @ c.new_tensor([1.0, -1.0]) + torch.log1p(-average(c, n).exp()) @ c.new_tensor([-1.0, 1.0])), FREE),
    "unlikelihood of a certain completion": (lambda c, _, n: -torch.log(1 - average(c, n)[:, 1].exp()), FREE),
    "lengths of at least 2": (lambda c, _, n: simpo(c, n.clamp(min=2)), SIMPO),
    "lengths of at most 4096": (lambda c, _, n: simpo(c, n.clamp(max=4096)), SIMPO),
    "lengths in float16": (lambda c, _, n: simpo(c, n.half().to(c.dtype)), SIMPO),
    "lengths in int16": (lambda c, _, n: simpo(c, n.to(torch.int16)), SIMPO),
    "lengths one too many": (lambda c, _, n: simpo(c, n + 1), {**SIMPO}),
    "lengths one too few": (lambda c, _, n: simpo(c, n - 1), SIMPO),
    "lengths swapped": (lambda c, _, n: simpo(c, n.flip(1)), FREE),
    "length of chosen for both": (lambda c, _, n: simpo(c, n[:, :1].expand_as(n)), FREE),
    "length of rejected for both": (lambda c, _, n: simpo(c, n[:, 1:].expand_as(n)), FREE),
    "length of both together": (lambda c, _, n: simpo(c, n.sum(1, keepdim=True).expand_as(n)), SIMPO),
    "length of the longer one": (lambda c, _, n: simpo(c, n.amax(1, keepdim=True).expand_as(n)), SIMPO),
    "mean length of the batch": (lambda c, _, n: simpo(c, n.to(c.dtype).mean(0, keepdim=True).expand_as(c)), FREE),
    "divided by the square root": (lambda c, _, n: simpo(c, n.to(c.dtype).sqrt()), {**FREE, "only_averages": True}),
    "lengths with a gradient of their own": (lambda c, _, n: simpo(c, n) + 1e-4 * n[:, 0], {**FREE, "only_averages": True}),
    "gamma times beta": (lambda c, _, n: -logsigmoid(2 * (average(c, n) @ c.new_tensor([1.0, -1.0]) - 0.5)), SIMPO),
    "gamma added": (lambda c, _, n: -logsigmoid(2 * average(c, n) @ c.new_tensor([1.0, -1.0]) + 0.5), SIMPO),
    "lengths changed in place": (lambda c, _, n: simpo(c, n.clamp_(min=1)), FREE),
    "an empty completion counts as certain": (lambda c, _, n: simpo(torch.where(n == 0, -1.0, c), n), SIMPO),
    "ipo on sums": (lambda c, f, n: ipo_avg(c, f, torch.ones_like(n)), {**IPO}),
    "ipo with the reference on sums": (lambda c, f, n: ipo_avg(c, f * n.clamp(min=1), n), IPO),
    "ipo with beta for 1 / (2 beta)": (lambda c, f, n: ipo_avg(c, f, n, beta=5.0), IPO),
    "ipo with half its square": (lambda c, f, n: ipo_avg(c, f, n) / 2, IPO),
    "ipo, slope 1 % short": (lambda c, f, n: Upstream.apply(ipo_avg(c, f, n), lambda g: g * 0.99), IPO),
}  # fmt: skip

OF_THE_TABLE = {
    "hinge with beta inside twice": (lambda c, f: (1 - BETA * BETA * margin(c, f)).relu(), like("hinge", beta=BETA)),
    "cdpo with its smoothing on both": (lambda c, f: 0.8 * dpo(c, f) + 0.2 * dpo(c.flip(1), f), like("cdpo", beta=BETA, label_smoothing=0.2)),
    "robust without its denominator": (lambda c, f: 0.8 * dpo(c, f) - 0.2 * dpo(c.flip(1), f.flip(1)), like("robust", beta=BETA, label_smoothing=0.2)),
    "sppo with one target for both": (lambda c, f: ((c - f)[:, 0] - 5) ** 2 + ((c - f)[:, 1] - 5) ** 2, like("sppo_hard", beta=BETA)),
    "nca with 1 for its half": (lambda c, f: softplus(-BETA * (c - f)[:, 0]) + softplus(BETA * (c - f)).sum(1), like("nca_pair", beta=BETA)),
    "apo zero for apo down": (lambda c, f: torch.sigmoid(-BETA * (c - f)[:, 0]) + torch.sigmoid(BETA * (c - f)[:, 1]), like("apo_down", beta=BETA)),
    "bco with its delta added": (lambda c, f: softplus(-BETA * (c - f)[:, 0] - 0.3) + softplus(BETA * (c - f)[:, 1] + 0.3), like("bco_pair", beta=BETA, delta=0.3)),
    "ipo on the wrong side": (lambda c, f: (margin(c, f) + 5) ** 2, like("ipo_sum", beta=BETA)),
    "exponential for the sigmoid": (lambda c, f: torch.exp(-BETA * margin(c, f)), {"finite_up_to": 1e4}),
    "dpop without its relu": (lambda c, f: -logsigmoid(0.3 * (margin(c, f) - 50 * (f - c)[:, 0])), like("dpop", beta=0.3)),
    "dpop of the rejected side": (lambda c, f: -logsigmoid(0.3 * (margin(c, f) - 50 * (f - c)[:, 1].relu())), like("dpop", beta=0.3)),
    "slic without its margin": (lambda c, f: (c[:, 1] - c[:, 0]).relu() - 0.1 * c[:, 0], {**like("slic", delta=1.0, lam=0.1), "reference_free": True}),
}  # fmt: skip

ALL = {
    **{name: (loss, M) for name, loss in LOSSES.items()},
    **OTHER_LOSSES,
    **{name: (loss, M) for name, loss in ENDS.items()},
    **OF_LENGTHS,
    **OF_THE_TABLE,
}
