"""What a row of the loss table is, and the ways to write one.

A formula reads the `Symbols` of the pairs and its parameters and returns the loss of each pair with
its derivatives by the summed log-probs of chosen and rejected: these two numbers a pair are all
that training needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpo_ext.torch.losses.forms import (
    Number,
    s,
    scaled_exp,
    sigmoid_times_exp,
    sp_of_minus,
    times,
)


@dataclass(frozen=True, slots=True)
class Parameter:
    """Default (None: the caller must give it) and domain of one parameter of a loss."""

    default: float | None
    domain: str
    contains: Callable[[Any], Any]
    per_pair: bool = True


@dataclass(frozen=True, slots=True)
class LossRow:
    """One loss.

    Attributes:
        name: the explicit id; it means this formula and no other.
        formula: ``(pairs, **parameters) -> (L, dL/dc, dL/dr)``, each (N,), or with a fourth entry
            that maps the names in ``differentiable`` to their derivatives; a user's own row has the
            signature of `register_loss`.
        text: the formula as a person writes it.
        paper: arXiv id and equation.
        parameters: name to `Parameter`.
        reference, lengths: the formula needs ``ref_logps``, ``lengths``.
        statistics: parameters come from token statistics of the log-prob head.
        constants: parameters are constants of each pair, such as a reward gap.
        couples_batch: a pair's gradient depends on the other pairs: no gradient accumulation, no
            `pairwise` plan.
        only_margin: ``dL/dr == -dL/dc`` always; only ``c - r`` matters.
        falls_in_chosen: never increasing in c.
        rises_in_rejected: never decreasing in r.
        convex: convex in (c, r).
        differentiable: parameters through which the gradient also flows when they are tensors that
            ask for it.
        autograd: a user's function of ``(logps, ref_logps)``, differentiated by autograd.
        on_cpu: the formula in one pass over tensors (N, 2) of the CPU: ``(logps, ref_logps,
            **parameters)``, numbers all, to the sum of L, L and its two derivatives side by side.
    """

    name: str
    formula: Callable[..., Any]
    text: str
    paper: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    reference: bool = True
    lengths: bool = False
    statistics: bool = False
    constants: bool = False
    couples_batch: bool = False
    only_margin: bool = False
    falls_in_chosen: bool = False
    rises_in_rejected: bool = False
    convex: bool = False
    differentiable: tuple[str, ...] = ()
    autograd: bool = False
    on_cpu: Callable[..., Any] | None = None


def finite(default: float | None = None) -> Parameter:
    return Parameter(default, "finite", lambda x: x - x == 0)


def positive(default: float | None = None, *, per_pair: bool = True) -> Parameter:
    return Parameter(default, "> 0", lambda x: (x > 0) & (x - x == 0), per_pair)


def non_negative(default: float | None = None) -> Parameter:
    return Parameter(default, ">= 0", lambda x: (x >= 0) & (x - x == 0))


def non_zero(default: float | None = None) -> Parameter:
    return Parameter(default, "not 0", lambda x: (x != 0) & (x - x == 0))


def open_unit(default: float | None = None) -> Parameter:
    return Parameter(default, "in (0, 1)", lambda x: (x > 0) & (x < 1))


def closed_unit(default: float | None = None, *, per_pair: bool = True) -> Parameter:
    return Parameter(default, "in [0, 1]", lambda x: (x >= 0) & (x <= 1), per_pair)


def below_half(default: float | None = None) -> Parameter:
    return Parameter(default, "in [0, 0.5)", lambda x: (x >= 0) & (x < 0.5))


def switch(default: float | None = None) -> Parameter:
    return Parameter(default, "0 or 1", lambda x: (x == 0) | (x == 1), per_pair=False)


MARGIN = finite(0.0)
SMOOTHING = closed_unit(0.0)

NEEDS = {
    "reference": "reference",
    "lengths": "lengths",
    "statistics": "token statistics",
    "constants": "constants of the pair",
    "couples_batch": "the whole batch",
}
"""What a row may need: the word, which is a flag of `LossRow`, and how a listing says it."""
SHAPE = {
    "only_margin": "only the margin",
    "falls_in_chosen": "falls in chosen",
    "rises_in_rejected": "rises in rejected",
    "convex": "convex",
}
"""What a row may be: the word, which is a flag of `LossRow`, and how a listing says it."""

Formula = Callable[..., Any]
Rows = dict[str, LossRow]


def find_row(rows: Rows, name: str) -> LossRow:
    """The row of a name, or the ValueError that lists the names."""
    if name not in rows:
        raise ValueError(f"`loss` must be one of {', '.join(map(repr, rows))}, found {name!r}")
    return rows[name]


def _flags(kind: str, words: str, known: Mapping[str, str]) -> dict[str, bool]:
    given = words.split()
    for word in given:
        if word not in known:
            raise ValueError(f"`{kind}` must be words among {', '.join(known)}, found {word!r}")
    return {word: word in given for word in known}


def _adder(
    rows: Rows, text: str, paper: str, needs: str, shape: str
) -> Callable[[Formula, Formula, Mapping[str, Any]], None]:
    """What puts a row into ``rows`` under the name of the function that was decorated."""
    flags: dict[str, Any] = {**_flags("needs", needs, NEEDS), **_flags("shape", shape, SHAPE)}

    def add(named: Formula, formula: Formula, more: Mapping[str, Any]) -> None:
        name = named.__name__
        if name in rows:
            raise ValueError(f"there is a row {name!r} already")
        rows[name] = LossRow(name, formula, text, paper, **flags, **more)

    return add


def u_row(
    rows: Rows,
    text: str,
    paper: str,
    *,
    needs: str = "",
    shape: str = "",
    differentiable: tuple[str, ...] = (),
    on_cpu: Formula | None = None,
    **parameters: Parameter,
) -> Callable[[Formula], Formula]:
    """A row ``L = sp(-v) + label_smoothing*v``, ``v = u - margin``, from a formula of ``u, du/dc,
    du/dr``.

    The formula adds a dict of ``du/dparameter`` where parameters are differentiable.
    """
    add = _adder(rows, f"L = sp(-u), {text}", paper, needs, shape)

    def register(u_formula: Formula) -> Formula:
        def formula(x, margin=0.0, label_smoothing=0.0, **p):
            u, uc, ur, *others = u_formula(x, **p)
            if _given(margin):
                u = u - margin
            loss, slope = sp_of_minus(u), s(-u)
            if _given(label_smoothing):
                loss, slope = loss + label_smoothing * u, slope - label_smoothing
            if not others:
                return loss, times(slope, -uc), times(slope, -ur)
            return loss, slope * -uc, slope * -ur, {k: slope * -du for k, du in others[0].items()}

        all_parameters = {**parameters, "margin": MARGIN, "label_smoothing": SMOOTHING}
        more = {
            "parameters": all_parameters, "differentiable": differentiable, "on_cpu": on_cpu
        }  # fmt: skip
        add(u_formula, formula, more)
        return u_formula

    return register


def u_exp_row(
    rows: Rows,
    text: str,
    paper: str,
    *,
    needs: str = "",
    shape: str = "",
    **parameters: Parameter,
) -> Callable[[Formula], Formula]:
    """As `u_row`, where ``du/dc = kc*e^bc`` and ``du/dr = -kr*e^br``: the formula returns ``u, kc,
    bc, kr, br``.
    """
    add = _adder(rows, f"L = sp(-u), {text}", paper, needs, shape)

    def register(u_formula: Formula) -> Formula:
        def formula(x, margin=0.0, label_smoothing=0.0, **p):
            u, kc, bc, kr, br = u_formula(x, **p)
            if _given(margin):
                u = u - margin
            if not _given(label_smoothing):
                return sp_of_minus(u), -sigmoid_times_exp(u, bc, kc), sigmoid_times_exp(u, br, kr)
            u = u.clamp(torch.finfo(u.dtype).min, torch.finfo(u.dtype).max)  # inf - inf is NaN
            loss, slope = sp_of_minus(u) + label_smoothing * u, s(-u) - label_smoothing
            zero = torch.zeros_like(u)
            gc = torch.where(slope == 0, zero, slope * scaled_exp(kc, bc))
            gr = torch.where(slope == 0, zero, slope * scaled_exp(kr, br))
            return loss, -gc, gr

        all_parameters = {**parameters, "margin": MARGIN, "label_smoothing": SMOOTHING}
        add(u_formula, formula, {"parameters": all_parameters})
        return u_formula

    return register


def m_row(
    rows: Rows,
    text: str,
    paper: str,
    *,
    needs: str = "",
    shape: str = "",
    **parameters: Parameter,
) -> Callable[[Formula], Formula]:
    """A row of ``m = beta*D`` alone, from a formula of ``L, dL/dm``.

    Where ``margin`` is among the parameters it is taken off ``m`` before the formula sees it.
    """
    add = _adder(rows, text, paper, needs, shape)

    def register(m_formula: Formula) -> Formula:
        def formula(x, beta, margin=0.0, **p):
            m = x.m(beta)
            if _given(margin):
                m = m - margin
            loss, slope = m_formula(m, **p)
            slope = times(slope, beta)
            return loss, slope, -slope

        add(m_formula, formula, {"parameters": parameters})
        return m_formula

    return register


def plain_row(
    rows: Rows,
    text: str,
    paper: str,
    *,
    needs: str = "",
    shape: str = "",
    **parameters: Parameter,
) -> Callable[[Formula], Formula]:
    """A row whose formula is the function itself."""
    add = _adder(rows, text, paper, needs, shape)

    def register(formula: Formula) -> Formula:
        add(formula, formula, {"parameters": parameters})
        return formula

    return register


def _given(x: Number) -> bool:
    return isinstance(x, Tensor) or x != 0.0
