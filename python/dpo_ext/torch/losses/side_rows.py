"""Rows of the table that look at the two sides of a pair apart, not through one margin alone.

They return ``L, dL/dc, dL/dr`` themselves; the rest is as in `margin_rows`.
"""

from __future__ import annotations

import math

import torch

from dpo_ext.torch.losses.forms import (
    below_zero,
    ds,
    exp_difference,
    indicator,
    log_odds,
    relu,
    s,
    sp,
)
from dpo_ext.torch.losses.row import (
    LossRow,
    closed_unit,
    finite,
    non_negative,
    plain_row,
    positive,
)

ROWS: dict[str, LossRow] = {}


@plain_row(
    ROWS,
    "L = (D - 1/(2*beta))**2",
    "2310.12036, eq. 17",
    needs="reference",
    shape="only_margin convex",
    beta=positive(0.1),
)
def ipo_sum(x, beta):
    e = x.D - 0.5 / beta
    return e * e, 2 * e, -2 * e


@plain_row(
    ROWS,
    "L = (xw/nw - xl/nl - 1/(2*beta))**2",
    "2310.12036, averaged",
    needs="reference lengths",
    shape="convex",
    beta=positive(0.1),
)
def ipo_avg(x, beta):
    nw, nl = x.nw, x.nl
    e = x.xw / nw - x.xl / nl - 0.5 / beta
    return e * e, 2 * e / nw, -2 * e / nl


@plain_row(
    ROWS,
    "L = max(0, delta - c + r) - lam*c",
    "2305.10425",
    shape="falls_in_chosen rises_in_rejected convex",
    delta=finite(1.0),
    lam=non_negative(0.1),
)
def slic(x, delta, lam):
    gap = delta - (x.c - x.r)
    k = indicator(gap > 0, gap)
    return relu(gap) - lam * x.c, -k - lam, k


@plain_row(
    ROWS,
    "L = sp(-a) + sp(a)/2 + sp(b)/2, a = beta*xw, b = beta*xl",
    "2402.05369",
    needs="reference",
    shape="rises_in_rejected convex",
    beta=positive(0.1),
)
def nca_pair(x, beta):
    a, b = beta * x.xw, beta * x.xl
    return sp(-a) + 0.5 * sp(a) + 0.5 * sp(b), beta * (0.5 * s(a) - s(-a)), 0.5 * beta * s(b)


@plain_row(
    ROWS,
    "L = sp(-(beta*xw - delta)) + sp(beta*xl - delta)",
    "2404.04656",
    needs="reference constants",
    shape="falls_in_chosen rises_in_rejected convex",
    beta=positive(0.1),
    delta=finite(),
)
def bco_pair(x, beta, delta):
    a, b = beta * x.xw - delta, beta * x.xl - delta
    return sp(-a) + sp(b), -beta * s(-a), beta * s(b)


@plain_row(
    ROWS,
    "L = lam_d*s(-beta*(xw - z)) + lam_u*s(beta*(xl - z))",
    "2402.01306, eq. 7",
    needs="reference constants",
    shape="falls_in_chosen rises_in_rejected",
    beta=positive(0.1),
    z=finite(),
    lam_d=non_negative(1.0),
    lam_u=non_negative(1.0),
)
def kto_pair_z(x, beta, z, lam_d, lam_u):
    a, b = beta * (x.xw - z), beta * (x.xl - z)
    return lam_d * s(-a) + lam_u * s(b), -lam_d * beta * ds(a), lam_u * beta * ds(b)


@plain_row(
    ROWS,
    "L = (xw - h)**2 + (xl + h)**2, h = 1/(2*beta)",
    "2405.00675, eq. 4.7",
    needs="reference",
    shape="convex",
    beta=positive(0.1),
)
def sppo_hard(x, beta):
    a, b = x.xw - 0.5 / beta, x.xl + 0.5 / beta
    return a * a + b * b, 2 * a, 2 * b


@plain_row(
    ROWS,
    "L = ((xw - h)**2 + (xl + h)**2)/2, h = (p - 0.5)/beta",
    "2405.00675",
    needs="reference constants",
    shape="convex",
    beta=positive(0.001),
    p=closed_unit(),
)
def sppo_soft(x, beta, p):
    h = (p - 0.5) / beta
    a, b = x.xw - h, x.xl + h
    return 0.5 * (a * a + b * b), a, b


@plain_row(
    ROWS,
    "L = s(-beta*xw) + s(beta*xl)",
    "2408.06266, eq. 7",
    needs="reference",
    shape="falls_in_chosen rises_in_rejected",
    beta=positive(0.1),
)
def apo_zero(x, beta):
    a, b = beta * x.xw, beta * x.xl
    return s(-a) + s(b), -beta * ds(a), beta * ds(b)


@plain_row(
    ROWS,
    "L = s(beta*xw) + s(-beta*D)",
    "2408.06266, eq. 8",
    needs="reference",
    shape="rises_in_rejected",
    beta=positive(0.1),
)
def apo_down(x, beta):
    a, m = beta * x.xw, x.m(beta)
    slope = beta * ds(m)
    return s(a) + s(-m), beta * ds(a) - slope, slope


@plain_row(
    ROWS,
    "L = sp(-beta*(c - r)) - alpha*c/nw",
    "2401.08417, eq. 3",
    needs="lengths",
    shape="falls_in_chosen rises_in_rejected convex",
    beta=positive(0.1),
    alpha=non_negative(1.0),
)
def cpo(x, beta, alpha):
    u = beta * (x.c - x.r)
    slope, nw = beta * s(-u), x.nw
    return sp(-u) - alpha * (x.c / nw), -slope - alpha / nw, slope


@plain_row(
    ROWS,
    "L = sp(-beta*D) - alpha*c/nw",
    "2404.19733 and 2405.16436",
    needs="reference lengths",
    shape="falls_in_chosen rises_in_rejected convex",
    beta=positive(0.1),
    alpha=non_negative(1.0),
)
def dpo_sft(x, beta, alpha):
    m = x.m(beta)
    slope, nw = beta * s(-m), x.nw
    return sp(-m) - alpha * (x.c / nw), -slope - alpha / nw, slope


@plain_row(
    ROWS,
    "L = -nll*cn + lam*sp(lo(rn) - lo(cn)), lo(a) = a - log(1 - e^a)",
    "2403.07691, eq. 4 and 7",
    needs="lengths",
    shape="falls_in_chosen rises_in_rejected",
    lam=non_negative(0.1),
    nll=non_negative(1.0),
)
def orpo(x, lam, nll):
    nw, nl = x.nw, x.nl
    cn, rn = below_zero(x.c / nw), below_zero(x.r / nl)
    u = log_odds(cn) - log_odds(rn)
    assert x.lengths is not None  # the row says that it needs them; checked before
    # the odds of an empty completion are infinite: NaN, which is an error on the host
    u = torch.where((x.lengths < 1).any(1), math.nan, u)
    slope = lam * s(-u)
    gc = (-nll + slope / torch.expm1(cn)) / nw
    return -nll * (x.c / nw) + lam * sp(-u), gc, -slope / torch.expm1(rn) / nl


@plain_row(
    ROWS,
    "L = sp(-D) + k*((xw - h)**2 + (xl + h)**2), h = 1/(2*beta)",
    "2412.14516",
    needs="reference",
    shape="convex",
    beta=positive(0.1),
    k=non_negative(1.0),
)
def cal_dpo(x, beta, k):
    a, b, slope = x.xw - 0.5 / beta, x.xl + 0.5 / beta, s(-x.D)
    return sp(-x.D) + k * (a * a + b * b), -slope + 2 * k * a, slope + 2 * k * b


@plain_row(
    ROWS,
    "L = exp(r/nl) - exp(c/nw)",
    "2502.00883",
    needs="lengths",
    shape="falls_in_chosen rises_in_rejected",
)
def simper(x):
    nw, nl = x.nw, x.nl
    cn, rn = x.c / nw, x.r / nl
    return exp_difference(rn, cn), -torch.exp(cn) / nw, torch.exp(rn) / nl


@plain_row(
    ROWS,
    "L = -c/nw",
    "maximum likelihood of the chosen completion",
    needs="lengths",
    shape="falls_in_chosen rises_in_rejected convex",
)
def sft(x):
    nw = x.nw
    return -x.c / nw, -1 / nw, torch.zeros_like(nw)
