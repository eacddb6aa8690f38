"""What other code bases compute under their names of preference losses.

Read in TRL 1.16.0 and 0.28.0, OpenRLHF and LLaMA-Factory as of 2026-08. An explicit id of our table
means its formula everywhere; `sigmoid` and `ipo` alone mean different formulas in different places,
so without a `compat` they are an error. Where a code base reads something that the sums of
log-probs do not hold, its name is refused with the reason.

Lengths are the caller's: TRL 1.16 counts the completion tokens of the unshifted mask for `ipo` and
`sigmoid_norm`.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dpo_ext.torch.losses.lists import LISTWISE
from dpo_ext.torch.losses.registry import LOSSES
from dpo_ext.torch.losses.row import LossRow
from dpo_ext.torch.losses.single import UNPAIRED
from dpo_ext.torch.numbers import as_number

_ELSEWHERE = {**dict.fromkeys(UNPAIRED, "unpaired_loss"), **dict.fromkeys(LISTWISE, "list_loss")}


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a name means in one code base.

    Attributes:
        row: our id.
        defaults: parameters whose default differs from the row's.
        fixed: parameters that the code base does not let its user choose.
        ignores: options that it takes and does not use; they warn once.
        refuses: parameters of our row that it does not have.
        renames: its option names to ours.
        averages: log-probs are divided by the lengths first, for every loss of the list and the
            metrics.
        refused: why the name cannot be reproduced from sums of log-probs.
    """

    row: str
    defaults: Mapping[str, float] = field(default_factory=dict)
    fixed: Mapping[str, float] = field(default_factory=dict)
    ignores: tuple[str, ...] = ()
    refuses: tuple[str, ...] = ()
    renames: Mapping[str, str] = field(default_factory=dict)
    averages: bool = False
    refused: str = ""


_BETA = {"beta": 0.1}
_BETA_EPS = {"beta": 0.1, "label_smoothing": 0.0}
_EPS = ("label_smoothing",)
_TOKEN_MEAN = Meaning("sft_token_mean", ignores=_EPS)
_SAME_IN_TRL = {
    "hinge": Meaning("hinge", _BETA, ignores=_EPS),
    "robust": Meaning("robust", _BETA_EPS),
    "nca_pair": Meaning("nca_pair", _BETA, ignores=_EPS),
    "sppo_hard": Meaning("sppo_hard", _BETA, ignores=_EPS),
    "apo_zero": Meaning("apo_zero", _BETA, ignores=_EPS),
    "apo_down": Meaning("apo_down", _BETA, ignores=_EPS),
    "discopop": Meaning("discopop", _BETA, ignores=_EPS, renames={"discopop_tau": "tau"}),
    "aot": Meaning("aot_paired", _BETA_EPS),
    "aot_unpaired": Meaning("aot_unpaired", _BETA_EPS),
    "simpo": Meaning("simpo", _BETA_EPS, renames={"simpo_gamma": "gamma"}),
    "sft": _TOKEN_MEAN,
    "orpo": Meaning(
        "orpo",
        refused="TRL's NLL is over prompt + chosen, which the completion's sum does not hold\n"
        "hint: use loss='orpo' with nll=0 and add an NLL of your own",
    ),
}

COMPAT: dict[str, dict[str, Meaning]] = {
    "trl-1.16": {
        **_SAME_IN_TRL,
        "sigmoid": Meaning("dpo", _BETA, ignores=_EPS, refuses=("margin",)),
        "ipo": Meaning("ipo_avg", _BETA, ignores=_EPS),
        "exo_pair": Meaning("exo_pair", _BETA_EPS),
        "bco_pair": Meaning("bco_pair", _BETA, fixed={"delta": 0.0}, ignores=_EPS),
        "sigmoid_norm": Meaning("dpo_norm", _BETA, ignores=_EPS, refuses=("margin",)),
        "ld_dpo": Meaning("ld_dpo", _BETA, ignores=_EPS, refuses=("margin",)),
        "wpo": Meaning("wpo", _BETA, fixed={"clamp": 0}, ignores=_EPS, refuses=("margin",)),
    },
    "trl-0.28": {
        **_SAME_IN_TRL,
        "sigmoid": Meaning("cdpo", _BETA_EPS, refuses=("margin",)),
        "ipo": Meaning("ipo_sum", _BETA, ignores=_EPS, averages=True),
        "exo_pair": Meaning("exo_pair", _BETA_EPS),
        "bco_pair": Meaning("bco_pair", _BETA, ignores=_EPS),
        "wpo": Meaning(
            "wpo",
            refused="its log-probs stand one position off its log sum p^2",
        ),
        "ld_dpo": Meaning(
            "ld_dpo", refused="it counts head and tail from the start of the row, prompt included"
        ),
    },
    "openrlhf": {
        "sigmoid": Meaning("cdpo", _BETA_EPS, refuses=("margin",)),
        "ipo": Meaning("ipo_sum", _BETA, ignores=_EPS),
        "sft": Meaning("sft", ignores=_EPS),
    },
    "llamafactory": {
        "sigmoid": Meaning("cdpo", _BETA_EPS, refuses=("margin",), renames={"pref_beta": "beta"}),
        "hinge": Meaning("hinge", _BETA, ignores=_EPS, renames={"pref_beta": "beta"}),
        "ipo": Meaning(
            "ipo_sum", _BETA, ignores=_EPS, averages=True, renames={"pref_beta": "beta"}
        ),
        "simpo": Meaning(
            "simpo",
            _BETA,
            ignores=_EPS,
            refuses=("margin",),
            renames={"simpo_gamma": "gamma", "pref_beta": "beta"},
        ),
        "orpo": Meaning(
            "orpo",
            {"lam": 0.1},
            fixed={"nll": 1.0},
            ignores=_EPS,
            renames={"pref_beta": "lam", "beta": "lam"},
        ),
        "sft": Meaning("sft", ignores=_EPS),
    },
    "paper": {
        "sigmoid": Meaning("dpo", refuses=("label_smoothing", "margin")),
        "ipo": Meaning("ipo_sum"),
        "sigmoid_norm": Meaning("dpo_norm", refuses=("label_smoothing", "margin")),
        "aot": Meaning("aot_paired"),
        "wpo": Meaning("wpo", fixed={"clamp": 1}, refuses=("label_smoothing", "margin")),
        "simpo": Meaning("simpo", refuses=("label_smoothing", "margin")),
        "orpo": Meaning("orpo", fixed={"nll": 1.0}),
    },
}
"""Code base, then its name, then what that means."""

NLL_OPTION = {
    "trl-0.28": ("rpo_alpha", "sft_token_mean"),
    "openrlhf": ("nll_loss_coef", "sft"),
    "llamafactory": ("pref_ftx", "sft"),
}
"""The option that adds an NLL of the chosen completion, and the row it adds."""


class Term(NamedTuple):
    """One summand: a factor, a loss of the table or a function, and what was given of its
    parameters.
    """

    factor: float
    loss: str | Callable[..., Any]
    given: dict[str, Any]


_warned: set[tuple[str, str, str]] = set()


def ambiguous(name: str) -> str | None:
    """Why a bare name is an error, if code bases compute several things under it or only they have
    it.
    """
    meanings: dict[str, list[str]] = {}
    for compat, names in COMPAT.items():
        if name in names:
            row = "ipo_avg" if names[name].averages else names[name].row
            meanings.setdefault(row, []).append(compat)
    if not meanings:
        return None
    choices = ", ".join(f"{row!r} ({', '.join(where)})" for row, where in meanings.items())
    return f"loss {name!r} is a code base's name for {choices}\nhint: name one, or pass `compat`"


def resolve(
    compat: str, losses: Sequence[Any], factors: Sequence[float], given: Mapping[str, Any]
) -> tuple[list[Term], bool]:
    """The terms ``(factor, row, parameters)`` that a code base sums, and whether it averages
    log-probs first.

    Raises:
        ValueError: the code base has no such loss (the message lists what it has), or not this
            option.
    """
    names = COMPAT.get(compat)
    if names is None:
        raise ValueError(
            f"`compat` must be one of {', '.join(map(repr, COMPAT))}, found {compat!r}"
        )
    options = dict(given)
    coefficient, nll_row = _take_nll(compat, options)
    bco_weight = options.pop("pref_bco_weight", 0.0) if compat == "llamafactory" else 0.0
    bco_weight = as_number("pref_bco_weight", bco_weight)
    delta = options.pop("delta", None) if bco_weight else None
    meanings = [_meaning(compat, names, name) for name in losses]
    _check_known(compat, losses, meanings, options)
    terms: list[Term] = []
    for name, factor, meaning in zip(losses, factors, meanings, strict=True):
        if meaning is None:
            terms.append(Term(factor, name, {}))
            continue
        own = _own_parameters(compat, name, meaning, options)
        if compat == "trl-0.28" and name == "exo_pair" and own.get("label_smoothing") == 0.0:
            options["label_smoothing"] = own["label_smoothing"] = (
                1e-3  # and so for the losses after it
            )
        row = _f_divergence(compat, name, meaning.row, own, options)
        terms.append(Term(factor, row, own))
    if bco_weight:
        share = 1 / (1 + bco_weight)
        beta = terms[0].given.get("beta", 0.1)
        bco: dict[str, Any] = {"beta": beta, **({} if delta is None else {"delta": delta})}
        terms = [Term(factor * share, row, own) for factor, row, own in terms]
        terms.append(Term(bco_weight * share, "bco_pair", bco))
    if coefficient:
        terms.append(Term(coefficient, nll_row, {}))
    return terms, any(meaning is not None and meaning.averages for meaning in meanings)


def _meaning(compat: str, names: Mapping[str, Meaning], name: Any) -> Meaning | None:
    """What a name means; None for a callable."""
    if not isinstance(name, str):
        return None
    meaning = names.get(name)
    if meaning is None and name in LOSSES:
        computes = {m.row for m in names.values() if not m.refused}
        if compat == "paper" or name in computes:
            meaning = Meaning(name)
    if meaning is None:
        raise ValueError(f"{compat} has no loss {name!r}\nhint: it has {', '.join(sorted(names))}")
    if meaning.refused:
        raise ValueError(f"loss {name!r} of {compat} is not reproduced: {meaning.refused}")
    return meaning


def _check_known(
    compat: str,
    losses: Sequence[Any],
    meanings: Sequence[Meaning | None],
    options: Mapping[str, Any],
) -> None:
    known = {"beta"}  # a loss without one scales its rewards with it
    ignored: set[str] = set()
    for meaning in meanings:
        if meaning is None:
            continue
        own = set(LOSSES[meaning.row].parameters) - set(meaning.refuses) - set(meaning.fixed)
        known |= (own - set(meaning.ignores)) | set(meaning.renames)
        ignored |= set(meaning.ignores)
    if compat.startswith("trl-"):
        known |= {"f_divergence_type", "f_alpha_divergence_coef"}
    for option in options:
        if option in known:
            continue
        if option not in ignored:
            raise ValueError(
                f"{compat} has no option `{option}` for {', '.join(map(repr, losses))}"
            )
        key = (compat, str(losses), option)
        if key not in _warned:
            _warned.add(key)
            warnings.warn(
                f"{compat} ignores `{option}` in {', '.join(map(repr, losses))}", stacklevel=4
            )


def _own_parameters(
    compat: str, name: str, meaning: Meaning, options: Mapping[str, Any]
) -> dict[str, Any]:
    row = LOSSES[meaning.row]
    own: dict[str, Any] = {k: v for k, v in meaning.defaults.items() if k in row.parameters}
    for option, value in options.items():
        target = meaning.renames.get(option, option)
        if target in row.parameters and option not in (*meaning.ignores, *meaning.refuses):
            own[target] = value
    return {**own, **meaning.fixed}


def _take_nll(compat: str, options: dict[str, Any]) -> tuple[float, str]:
    option, row = NLL_OPTION.get(compat, ("", ""))
    return float(as_number(option, options.pop(option, None)) or 0.0), row


def _f_divergence(
    compat: str, name: str, row: str, own: dict[str, Any], options: Mapping[str, Any]
) -> str:
    """The row of a divergence other than the reverse KL, for `sigmoid`."""
    divergence = options.get("f_divergence_type", "reverse_kl")
    coefficient = options.get("f_alpha_divergence_coef")
    if divergence == "reverse_kl":
        if coefficient is not None:
            raise ValueError("`f_alpha_divergence_coef` needs f_divergence_type='alpha_divergence'")
        return row
    rows = {"js_divergence": "fdpo_js", "alpha_divergence": "fdpo_alpha"}
    if compat == "trl-1.16":
        rows["forward_kl"] = "fdpo_forward_kl"
    if divergence not in rows or name != "sigmoid":
        raise ValueError(
            f"`f_divergence_type` must be one of {', '.join(map(repr, ('reverse_kl', *rows)))} "
            f"with loss 'sigmoid', found {divergence!r} with {name!r}"
        )
    if divergence == "alpha_divergence":
        default = 0.5 if compat == "trl-1.16" else 1.0
        value = (
            default
            if coefficient is None
            else float(as_number("f_alpha_divergence_coef", coefficient))
        )
        own["alpha"] = 1 - value if compat == "trl-1.16" else value
    return rows[divergence]


def find_loss(name: str) -> LossRow:
    """The row of a name.

    Raises:
        ValueError: there is none; the message has what was probably meant.
    """
    row = LOSSES.get(name)
    if row is None:
        if name in _ELSEWHERE:
            raise ValueError(
                f"loss {name!r} is not of pairs\nhint: dpo_ext.torch.{_ELSEWHERE[name]} has it"
            )
        why = ambiguous(name)
        if why is not None:
            raise ValueError(why)
        close = difflib.get_close_matches(name, LOSSES, n=3, cutoff=0.5)
        meant = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        raise ValueError(f"unknown loss {name!r}\nhint: {meant}`dpo-ext losses` lists them all")
    return row
