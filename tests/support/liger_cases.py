"""Drawn inputs and slow formulas of Liger's chunked losses."""

from __future__ import annotations

from typing import Any

import torch
from compat_cases import Case, Draw
from compat_formulas import gathered
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dpo_ext.compat import liger

HEAD = ("_input", "lin_weight", "bias")
OPTIONS = (
    "ignore_index",
    "beta",
    "alpha",
    "label_smoothing",
    "compute_nll_loss",
    "compiled",
    "use_ref_model",
    "average_log_prob",
    "gamma",
    "chunk_size",
    "loss_type",
    "discopop_tau",
)


def module(cls):
    """The module of the options, called with the rest; the loss and all values."""

    def call(**args: Any):
        options = {name: args.pop(name) for name in OPTIONS if name in args}
        return cls(**options)(**args)

    return call


def draw_head(d: Draw) -> dict[str, Any]:
    N, T, H, V = d.int(1, 4), d.int(2, 6), d.int(1, 5), d.of(2, 7, 33, 130)
    pad = d.of(-100, -7)
    return {
        "_input": d.normal(2 * N, T, H),
        "lin_weight": d.normal(V, H),
        "target": d.labels(V, 2 * N, T, pad),
        "bias": d.normal(V) if d.int(0, 1) else None,
        "ignore_index": pad,
        "beta": d.of(0.1, 0.5),
        "chunk_size": d.of(1, 2),
        "compiled": False,
    }


def add_reference(d: Draw, args: dict[str, Any]) -> dict[str, Any]:
    args["use_ref_model"] = bool(d.int(0, 2))
    if args["use_ref_model"]:
        args["ref_input"] = d.normal(*args["_input"].shape)
        args["ref_weight"] = d.normal(*args["lin_weight"].shape)
        args["ref_bias"] = d.normal(len(args["lin_weight"])) if d.int(0, 1) else None
    args["average_log_prob"] = bool(d.int(0, 1))
    return args


def draw_dpo(d: Draw) -> dict[str, Any]:
    args = add_reference(d, draw_head(d))
    args |= {"alpha": d.of(1.0, 0.3), "compute_nll_loss": bool(d.int(0, 1))}
    names = liger.LigerFusedLinearDPOLoss._SUPPORTED_LOSS_TYPES
    return {**args, "loss_type": d.of("sigmoid", *names), "label_smoothing": d.of(0.1, 0.3)}


def draw_old_dpo(d: Draw) -> dict[str, Any]:
    """What 0.5 to 0.7 have too."""
    args = draw_dpo(d)
    del args["label_smoothing"], args["alpha"], args["loss_type"]
    return args


def draw_cpo(d: Draw) -> dict[str, Any]:
    args = draw_head(d)
    args |= {"alpha": d.of(1.0, 0.3), "compute_nll_loss": bool(d.int(0, 1))}
    return {**args, "label_smoothing": d.of(0.0, 0.2), "average_log_prob": bool(d.int(0, 1))}


def draw_simpo(d: Draw) -> dict[str, Any]:
    args = draw_cpo(d)
    del args["average_log_prob"]
    return {**args, "gamma": d.of(0.5, 1.4)}


def draw_orpo(d: Draw) -> dict[str, Any]:
    args = draw_head(d)
    target = args["target"]
    kind = d.int(0, 2)
    if kind == 1:  # the prompt too, as TRL gives it
        more = d.ids(len(args["lin_weight"]), *target.shape)
        args["nll_target"] = torch.where(target == args["ignore_index"], more, target)
    if kind == 2:  # labels of their own
        args["nll_target"] = d.labels(len(args["lin_weight"]), *target.shape, args["ignore_index"])
    return {**args, "compute_nll_loss": bool(d.int(0, 3))}


def draw_kto(d: Draw) -> dict[str, Any]:
    args = add_reference(d, draw_head(d))
    good = d.mask(len(args["target"]))
    good[0] = True
    args |= {"preference_labels": good, "kl": d.of(None, torch.tensor(0.3), torch.tensor([0.7]))}
    return args


def draw_old_kto(d: Draw) -> dict[str, Any]:
    """Of 0.5 to 0.7, whose sums beside the loss are wrong for chunks of several rows."""
    return {**draw_kto(d), "chunk_size": 1}


def slow_rows(hidden: Tensor, weight: Tensor, bias, target, ignored: int, average: bool):
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    mask = target != ignored
    logps = gathered(logits, target.masked_fill(~mask, 0)) * mask
    sums = logps.sum(-1)
    return (sums / mask.sum(-1) if average else sums), logits, logps, mask


def slow_pairs(args: dict[str, Any], average: bool, nll: bool, nll_target=None):
    head = (args["_input"], args["lin_weight"], args.get("bias"))
    ignored = args["ignore_index"]
    logps, logits, _, _ = slow_rows(*head, args["target"], ignored, average)
    N = len(logps) // 2
    of_nll = args["target"] if nll_target is None else nll_target
    _, _, tokens, mask = slow_rows(*head, of_nll, ignored, False)
    loss = -tokens[:N].sum() / mask[:N].sum() if nll else torch.zeros((), dtype=logps.dtype)
    means = (logits[:N].detach().mean(), logits[N:].detach().mean())
    return logps[:N], logps[N:], *means, loss


def slow_preference(kind: str, c, r, cr, rr, args: dict[str, Any]):
    beta, eps = args["beta"], args.get("label_smoothing", 0.0)
    xw, xl = c - cr, r - rr
    m, ls, s = beta * (xw - xl), F.logsigmoid, torch.sigmoid
    tau = args.get("discopop_tau", 0.05)
    return {
        "sigmoid": lambda: -ls(m),
        "hinge": lambda: torch.relu(1 - m),
        "exo_pair": lambda: (
            s(m) * (ls(m) - torch.log1p(torch.tensor(-eps, dtype=torch.float64)))
            + s(-m) * (ls(-m) - torch.tensor(eps, dtype=torch.float64).log())
        ),
        "nca_pair": lambda: -ls(beta * xw) - 0.5 * ls(-beta * xw) - 0.5 * ls(-beta * xl),
        "robust": lambda: (-(1 - eps) * ls(m) + eps * ls(-m)) / (1 - 2 * eps),
        "bco_pair": lambda: -ls(beta * xw) - ls(-beta * xl),
        "sppo_hard": lambda: (xw - 0.5 / beta) ** 2 + (xl + 0.5 / beta) ** 2,
        "apo_zero": lambda: s(-beta * xw) + s(beta * xl),
        "apo_down": lambda: s(beta * xw) + s(-m),
        "discopop": lambda: -ls(m) * s(-m / tau) + (-m).exp() * s(m / tau),
    }[kind]()


def slow_dpo(**args: Any):
    average = args["average_log_prob"]
    c, r, *means, nll = slow_pairs(args, average, args["compute_nll_loss"])
    N, cr, rr = len(c), torch.zeros_like(c).detach(), torch.zeros_like(r).detach()
    if args["use_ref_model"]:
        head = (args["ref_input"], args["ref_weight"], args.get("ref_bias"))
        ref = slow_rows(*head, args["target"], args["ignore_index"], average)[0].detach()
        cr, rr = ref[:N], ref[N:]
    losses = slow_preference(args.get("loss_type", "sigmoid"), c, r, cr, rr, args)
    loss = args.get("alpha", 1.0) * nll + losses.mean()
    beta = args["beta"]
    values = (c, r, *means, nll, beta * (c - cr), beta * (r - rr))
    return loss, tuple(v.detach() for v in values)


def slow_smoothed(args: dict[str, Any], average: bool, gamma: float):
    c, r, *means, nll = slow_pairs(args, average, args["compute_nll_loss"])
    u, eps, beta = args["beta"] * (c - r) - gamma, args["label_smoothing"], args["beta"]
    losses = (1 - eps) * F.softplus(-u) + eps * F.softplus(u)
    loss = args["alpha"] * nll + losses.mean()
    return loss, tuple(v.detach() for v in (c, r, *means, nll, beta * c, beta * r))


def slow_cpo(**args: Any):
    return slow_smoothed(args, args["average_log_prob"], 0.0)


def slow_simpo(**args: Any):
    return slow_smoothed(args, True, args["gamma"])


def slow_orpo(**args: Any):
    c, r, *means, nll = slow_pairs(args, True, args["compute_nll_loss"], args.get("nll_target"))
    log_odds = (c - r) - (torch.log1p(-c.exp()) - torch.log1p(-r.exp()))
    ratio, beta = F.logsigmoid(log_odds), args["beta"]
    values = (c, r, *means, nll, beta * c, beta * r, ratio.mean(), log_odds.mean())
    return nll - beta * ratio.mean(), tuple(v.detach() for v in values)


def slow_kto(**args: Any):
    average, good = args["average_log_prob"], args["preference_labels"]
    head = (args["_input"], args["lin_weight"], args.get("bias"))
    logps, logits, _, _ = slow_rows(*head, args["target"], args["ignore_index"], average)
    x, beta = logps, args["beta"]
    if args["use_ref_model"]:
        ref = (args["ref_input"], args["ref_weight"], args.get("ref_bias"))
        x = x - slow_rows(*ref, args["target"], args["ignore_index"], average)[0].detach()
    shifted = x if args["kl"] is None else x - args["kl"].double()
    losses = torch.sigmoid(-beta * torch.where(good, shifted, -shifted))
    sums = [v[side].sum() for v in (logps, logits.sum((1, 2)), beta * x) for side in (good, ~good)]
    return losses.mean(), tuple(v.detach() for v in sums)


def _case(name: str, draw, slow) -> Case:
    full = f"LigerFusedLinear{name}Loss"
    return Case(full, module(getattr(liger, full)), slow, draw, HEAD)


LIGER = (
    _case("DPO", draw_dpo, slow_dpo),
    _case("CPO", draw_cpo, slow_cpo),
    _case("SimPO", draw_simpo, slow_simpo),
    _case("ORPO", draw_orpo, slow_orpo),
    _case("KTO", draw_kto, slow_kto),
)
LIGER_OLD = (
    _case("DPO", draw_old_dpo, slow_dpo),
    *LIGER[1:4],
    _case("KTO", draw_old_kto, slow_kto),
)
