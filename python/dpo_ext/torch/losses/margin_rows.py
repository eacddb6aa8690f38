"""Rows of the table whose loss is a function of one margin of the pair.

- `u_row` is ``L = sp(-u)``: the formula returns ``u, du/dc, du/dr``, and `margin` and
  `label_smoothing` are theirs for free: ``L = sp(-v) + label_smoothing*v`` with ``v = u - margin``;
- `m_row` depends on the DPO margin ``m = beta*D`` alone: the formula returns ``L, dL/dm``;
- `plain_row` returns ``L, dL/dc, dL/dr`` itself.

The name of a function is the name of its loss. After the rows that it joins: the formula as text,
arXiv id and equation, what it needs and its shape, in the words of `LossRow`, and its parameters.
`sp` is softplus, `s` the sigmoid, `ds` its derivative; other names are those of `Symbols`. At a
kink the derivative is that of the side written first: ``relu'(0) = 0``, a ``min`` tie takes its
first argument, a clip has 0 outside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_ext.torch.losses.forms import (
    Number,
    ds,
    exp_difference,
    indicator,
    log,
    relu,
    s,
    scaled_exp,
    sp,
)
from dpo_ext.torch.losses.one_pass import dpo_loss
from dpo_ext.torch.losses.row import (
    MARGIN,
    SMOOTHING,
    LossRow,
    below_half,
    closed_unit,
    finite,
    m_row,
    non_negative,
    non_zero,
    open_unit,
    plain_row,
    positive,
    switch,
    u_exp_row,
    u_row,
)

ROWS: dict[str, LossRow] = {}

# L = sp(-u)


@u_row(
    ROWS,
    "u = beta*D",
    "2305.18290, eq. 7",
    needs="reference",
    shape="only_margin falls_in_chosen rises_in_rejected convex",
    on_cpu=dpo_loss,
    beta=positive(0.1),
)
def dpo(x, beta):
    return x.m(beta), beta, -beta


@u_row(
    ROWS,
    "u = beta*(xw/nw - xl/nl)",
    "2411.15124",
    needs="reference lengths",
    shape="falls_in_chosen rises_in_rejected convex",
    beta=positive(5.0),
)
def dpo_norm(x, beta):
    nw, nl = x.nw, x.nl
    return beta * (x.xw / nw - x.xl / nl), beta / nw, -beta / nl


@u_row(
    ROWS,
    "u = beta*D + alpha*(nw - nl)",
    "2403.19159",
    needs="reference lengths",
    shape="only_margin falls_in_chosen rises_in_rejected convex",
    beta=positive(0.1),
    alpha=non_negative(0.01),
)
def r_dpo(x, beta, alpha):
    return x.m(beta) + alpha * (x.nw - x.nl), beta, -beta


@u_row(
    ROWS,
    "u = beta*D - alpha*log(score_gap)",
    "2402.10571",
    needs="reference constants",
    shape="only_margin falls_in_chosen rises_in_rejected convex",
    beta=positive(0.1),
    alpha=non_negative(1.0),
    score_gap=positive(),
)
def odpo(x, beta, alpha, score_gap):
    return x.m(beta) - alpha * log(score_gap), beta, -beta


@u_row(
    ROWS,
    "u = beta*D - gamma",
    "generic: constants of each pair on detached data",
    needs="reference constants",
    shape="only_margin falls_in_chosen rises_in_rejected convex",
    beta=positive(0.1),
    gamma=finite(),
)
def margin_dpo(x, beta, gamma):
    return x.m(beta) - gamma, beta, -beta


@u_row(
    ROWS,
    "u = (beta*D - w_other*dr_other)/w_k",
    "2310.03708",
    needs="reference constants",
    shape="only_margin falls_in_chosen rises_in_rejected convex",
    beta=positive(0.1),
    w_k=positive(),
    w_other=finite(),
    dr_other=finite(),
)
def modpo(x, beta, w_k, w_other, dr_other):
    slope = beta / w_k
    return (x.m(beta) - w_other * dr_other) / w_k, slope, -slope


@u_row(
    ROWS,
    "u = beta*((c - r) - max(0, cr - rr))",
    "2602.11902",
    needs="reference",
    shape="only_margin falls_in_chosen rises_in_rejected convex",
    beta=positive(0.1),
)
def hypo(x, beta):
    return beta * ((x.c - x.r) - relu(x.cr - x.rr)), beta, -beta


@u_row(
    ROWS,
    "u = beta*(c/nw - r/nl) - gamma",
    "2405.14734",
    needs="lengths",
    shape="falls_in_chosen rises_in_rejected convex",
    beta=positive(2.0),
    gamma=finite(0.5),
)
def simpo(x, beta, gamma):
    nw, nl = x.nw, x.nl
    return beta * (x.c / nw - x.r / nl) - gamma, beta / nw, -beta / nl


@u_exp_row(
    ROWS,
    "u = (beta/alpha)*(exp(-alpha*r/nl) - exp(-alpha*c/nw)) - gamma",
    "2501.03884",
    needs="lengths",
    shape="falls_in_chosen rises_in_rejected",
    beta=positive(2.5),
    gamma=finite(0.25),
    alpha=non_zero(0.25),
)
def alphapo(x, beta, gamma, alpha):
    nw, nl = x.nw, x.nl
    bc, br = -alpha * (x.c / nw), -alpha * (x.r / nl)
    return exp_difference(br, bc, beta / alpha) - gamma, beta / nw, bc, beta / nl, br


@u_row(
    ROWS,
    "u = beta*(D - lam*max(0, -xw))",
    "2402.13228",
    needs="reference",
    shape="falls_in_chosen rises_in_rejected convex",
    beta=positive(0.3),
    lam=non_negative(50.0),
)
def dpop(x, beta, lam):
    return beta * (x.D - lam * relu(-x.xw)), beta * (1 + lam * indicator(x.xw < 0, x.xw)), -beta


@u_row(
    ROWS,
    "u = beta*(xw - f*xl)",
    "2502.07599",
    needs="reference",
    shape="falls_in_chosen rises_in_rejected convex",
    beta=positive(0.1),
    f=non_negative(0.75),
)
def dpo_shift(x, beta, f):
    return beta * (x.xw - f * x.xl), beta, -beta * f


@u_row(
    ROWS,
    "u = beta*(xw - log(lam*e^xl + 1 - lam))",
    "2506.12725",
    needs="reference",
    shape="falls_in_chosen rises_in_rejected convex",
    beta=positive(0.1),
    lam=open_unit(0.5),
)
def bdpo(x, beta, lam):
    rest = log(1 - lam)
    shifted = x.xl + (log(lam) - rest)
    return beta * (x.xw - (rest + sp(shifted))), beta, -beta * s(shifted)


@u_row(
    ROWS,
    "u = min(beta*xw, -alpha*beta*xl)",
    "2506.03557",
    needs="reference",
    shape="falls_in_chosen rises_in_rejected convex",
    beta=positive(0.1),
    alpha=non_negative(1.0),
)
def bpo_balanced(x, beta, alpha):
    a, b = beta * x.xw, -alpha * beta * x.xl
    first = indicator(a <= b, a)
    return torch.minimum(a, b), beta * first, -alpha * beta * (1 - first)


@u_exp_row(
    ROWS,
    "u = beta*(exp(-xl) - exp(-xw))",
    "2309.16240",
    needs="reference",
    shape="falls_in_chosen rises_in_rejected",
    beta=positive(0.1),
)
def fdpo_forward_kl(x, beta):
    return exp_difference(-x.xl, -x.xw, beta), beta, -x.xw, beta, -x.xl


@u_row(
    ROWS,
    "u = beta*(sp(-xl) - sp(-xw))",
    "2309.16240",
    needs="reference",
    shape="falls_in_chosen rises_in_rejected",
    beta=positive(0.1),
)
def fdpo_js(x, beta):
    return beta * (sp(-x.xl) - sp(-x.xw)), beta * s(-x.xw), -beta * s(-x.xl)


@u_exp_row(
    ROWS,
    "u = (beta/alpha)*(exp(-alpha*xl) - exp(-alpha*xw))",
    "2309.16240",
    needs="reference",
    shape="falls_in_chosen rises_in_rejected",
    beta=positive(0.1),
    alpha=non_zero(0.5),
)
def fdpo_alpha(x, beta, alpha):
    bc, br = -alpha * x.xw, -alpha * x.xl
    return exp_difference(br, bc, beta / alpha), beta, bc, beta, br


@u_row(
    ROWS,
    "u = clip(beta*((e^xw + xw) - (e^xl + xl)), -clip2r, clip2r)",
    "2407.13399",
    needs="reference",
    shape="falls_in_chosen rises_in_rejected",
    beta=positive(0.1),
    clip2r=positive(10.0),
)
def chipo(x, beta, clip2r):
    v = exp_difference(x.xw, x.xl, beta) + x.m(beta)
    inside = v.abs() < clip2r  # before the exponentials: inf * 0 is NaN
    zero = torch.zeros_like(v)
    uc = torch.where(inside, beta + scaled_exp(beta, x.xw), zero)
    ur = torch.where(inside, -beta - scaled_exp(beta, x.xl), zero)
    return torch.minimum(torch.maximum(v, zero - clip2r), zero + clip2r), uc, ur


@u_row(
    ROWS,
    "u = beta*(D - (kl - kw))",
    "2404.11999",
    needs="reference statistics",
    shape="only_margin falls_in_chosen rises_in_rejected convex",
    differentiable=("kw", "kl"),
    beta=positive(0.1),
    kw=finite(),
    kl=finite(),
)
def tdpo1(x, beta, kw, kl):
    return beta * (x.D - (kl - kw)), beta, -beta, {"kw": beta, "kl": -beta}


@u_row(
    ROWS,
    "u = beta*(D - alpha*(kl - kw)), kw detached",
    "2404.11999",
    needs="reference statistics",
    shape="only_margin falls_in_chosen rises_in_rejected convex",
    differentiable=("kl",),
    beta=positive(0.1),
    alpha=non_negative(0.5),
    kw=finite(),
    kl=finite(),
)
def tdpo2(x, beta, alpha, kw, kl):
    return beta * (x.D - alpha * (kl - kw)), beta, -beta, {"kl": -alpha * beta}


# L of m = beta*D alone


@m_row(
    ROWS,
    "L = sp(-m) + label_smoothing*m",
    "Mitchell 2023, note on noisy preferences, eq. 3",
    needs="reference",
    shape="only_margin convex",
    beta=positive(0.1),
    label_smoothing=closed_unit(),
    margin=MARGIN,
)
def cdpo(m, label_smoothing):
    return sp(-m) + label_smoothing * m, label_smoothing - s(-m)


@m_row(
    ROWS,
    "L = sp(-m) - m*label_smoothing/(1 - 2*label_smoothing)",
    "2403.00409",
    needs="reference",
    shape="only_margin falls_in_chosen rises_in_rejected convex",
    beta=positive(0.1),
    label_smoothing=below_half(),
    margin=MARGIN,
)
def robust(m, label_smoothing):
    k = label_smoothing / (1 - 2 * label_smoothing)
    return sp(-m) - k * m, -s(-m) - k


@m_row(
    ROWS,
    "L = max(0, 1 - m)",
    "2309.06657 and 2305.10425",
    needs="reference",
    shape="only_margin falls_in_chosen rises_in_rejected convex",
    beta=positive(0.1),
)
def hinge(m):
    return relu(1 - m), -indicator(m < 1, m)


@m_row(
    ROWS,
    "L = s(m)*log(s(m)/(1 - eps)) + s(-m)*log(s(-m)/eps)",
    "2402.00856, eq. 16",
    needs="reference",
    shape="only_margin",
    beta=positive(0.1),
    label_smoothing=open_unit(1e-3),
)
def exo_pair(m, label_smoothing):
    log_keep, log_flip = log(1 - label_smoothing), log(label_smoothing)
    loss = s(m) * (-sp(-m) - log_keep) + s(-m) * (-sp(m) - log_flip)
    return loss, ds(m) * (m - (log_keep - log_flip))


@m_row(
    ROWS,
    "L = sp(-m)*s(-m/tau) + exp(-m)*s(m/tau)",
    "2406.08414, eq. 5",
    needs="reference",
    shape="only_margin",
    beta=positive(0.05),
    tau=positive(0.05),
)
def discopop(m, tau):
    t = m / tau
    gated = torch.exp(-m - sp(-t))  # exp(-m)*s(t), without inf * 0
    slope = -s(-m) * s(-t) - gated + (gated * s(-t) - ds(t) * sp(-m)) / tau
    return sp(-m) * s(-t) + gated, slope


@m_row(
    ROWS,
    "L = sp(-m)*exp(-g*sp(-m))",
    "2501.06645",
    needs="reference",
    shape="only_margin",
    beta=positive(0.1),
    g=non_negative(0.05),
)
def focalpo(m, g):
    nll = sp(-m)
    factor = torch.exp(-g * nll)
    return nll * factor, -s(-m) * factor * (1 - g * nll)


@plain_row(
    ROWS,
    "L = (lam*exp(-(lam + 1)*m) - (lam + 1)*exp(lam*m))/(4*lam*(lam + 1))",
    "2505.19601",
    needs="reference",
    shape="only_margin falls_in_chosen rises_in_rejected",
    beta=positive(0.02),
    lam=positive(0.5),
)
def bpo_sba(x, beta, lam):
    m = x.m(beta)
    down, up = -(lam + 1) * m, lam * m
    loss = scaled_exp(0.25 / (lam + 1), down) - scaled_exp(0.25 / lam, up)
    slope = scaled_exp(0.25 * beta, down) + scaled_exp(0.25 * beta, up)
    return loss, -slope, slope


def _gap(m: Tensor, eta: Number, dr: Number) -> Tensor:
    """``eta*dr`` as a tensor like m."""
    return torch.zeros_like(m) + eta * dr


@m_row(
    ROWS,
    "KL(s(a), s(m)), a = eta*dr",
    "2406.11704 and 2502.00203",
    needs="reference constants",
    shape="only_margin convex",
    beta=positive(0.1),
    eta=positive(1.0),
    dr=finite(),
)
def rpo_bwd_kl(m, eta, dr):
    a = _gap(m, eta, dr)
    return s(a) * (sp(-m) - sp(-a)) + s(-a) * (sp(m) - sp(a)), s(m) - s(a)


@m_row(
    ROWS,
    "KL(s(m), s(a)), a = eta*dr",
    "2502.00203",
    needs="reference constants",
    shape="only_margin",
    beta=positive(0.1),
    eta=positive(1.0),
    dr=finite(),
)
def rpo_fwd_kl(m, eta, dr):
    a = _gap(m, eta, dr)
    return s(m) * (sp(-a) - sp(-m)) + s(-m) * (sp(a) - sp(m)), ds(m) * (m - a)


@m_row(
    ROWS,
    "L = (m - eta*dr)**2",
    "2502.00203",
    needs="reference constants",
    shape="only_margin convex",
    beta=positive(0.1),
    eta=positive(1.0),
    dr=finite(),
)
def rpo_sq(m, eta, dr):
    e = m - eta * dr
    return e * e, 2 * e


@m_row(
    ROWS,
    "L = w*(sp(-m) + label_smoothing*m), w = exp(aw + al), at most 1 if clamp",
    "2406.11827, eq. 2",
    needs="reference statistics",
    shape="only_margin falls_in_chosen rises_in_rejected convex",
    beta=positive(0.1),
    aw=finite(),
    al=finite(),
    clamp=switch(1),
    label_smoothing=SMOOTHING,
    margin=MARGIN,
)
def wpo(m, aw, al, clamp, label_smoothing):
    w = torch.exp(torch.zeros_like(m) + aw + al)
    if clamp:
        w = w.clamp(max=1)
    return w * (sp(-m) + label_smoothing * m), w * (label_smoothing - s(-m))
