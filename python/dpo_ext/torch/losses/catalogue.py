"""The losses for people: `losses_table` for listings, and the pages of docs/losses.

    python -m dpo_ext.torch.losses.catalogue docs/losses

writes the pages; a test compares them with what is committed.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dpo_ext.torch.losses.compat import COMPAT
from dpo_ext.torch.losses.pairs import preference_loss
from dpo_ext.torch.losses.row import LOSSES, LossRow
from dpo_ext.torch.losses.single import LISTWISE, UNPAIRED


@dataclass(frozen=True, slots=True)
class LossEntry:
    """One line of the listing: everything as text, ``domains`` by parameter."""

    name: str
    function: str
    formula: str
    paper: str
    parameters: str
    needs: str
    shape: str
    domains: Mapping[str, str]


def losses_table() -> list[LossEntry]:
    """Every loss: of pairs (registered ones too), of single completions, of lists.

    >>> entry = losses_table()[0]
    >>> entry.name, entry.function, entry.parameters, entry.shape
    ('dpo', 'preference_loss', 'beta=0.1, margin=0, label_smoothing=0', 'M c r X')
    """
    tables: tuple[tuple[str, Mapping[str, LossRow]], ...] = (
        (preference_loss.__name__, LOSSES),
        ("unpaired_loss", UNPAIRED),
        ("list_loss", LISTWISE),
    )
    return [_entry(row, function) for function, rows in tables for row in rows.values()]


def _entry(row: LossRow, function: str) -> LossEntry:
    needs = {
        "reference": row.reference,
        "lengths": row.lengths,
        "token statistics": row.statistics,
        "constants of the pair": row.constants,
        "the whole batch": row.couples_batch,
    }
    shape = ["M"] * row.only_margin + list(row.monotone) + ["X"] * row.convex
    parameters = (
        f"{name}={'required' if p.default is None else format(p.default, 'g')}"
        for name, p in row.parameters.items()
    )
    return LossEntry(
        row.name,
        function,
        row.text,
        row.paper,
        ", ".join(parameters),
        ", ".join(name for name, needed in needs.items() if needed),
        " ".join(shape),
        {name: p.domain for name, p in row.parameters.items()},
    )


@dataclass(frozen=True, slots=True)
class Family:
    """A page: losses of one idea, and when to reach for them."""

    title: str
    prose: str
    names: tuple[str, ...]


FAMILIES: dict[str, Family] = {
    "dpo": Family(
        "DPO and its margins",
        "The negative log-likelihood of a Bradley-Terry model whose reward is the policy's own "
        "log-ratio to the reference. Start here. The relatives add a known constant to the "
        "margin of each pair: a reward gap (`odpo`, `margin_dpo`), the rewards of other "
        "objectives (`modpo`), a length difference (`r_dpo`), or drop a part of the reference's "
        "margin (`hypo`). A pair whose margin is large hardly pushes any more, and none pushes "
        "with more than the factor before `D` in its formula.",
        ("dpo", "dpo_norm", "r_dpo", "odpo", "margin_dpo", "modpo", "hypo"),
    ),
    "noise": Family(
        "Noisy labels",
        "Some labels are flipped. `cdpo` trains towards the probability `1 - label_smoothing` "
        "and stops there, so its optimum on clean labels is that of DPO on flipped ones. "
        "`robust` subtracts what the flips add on average: unbiased, of higher variance. "
        "`exo_pair` matches the whole label distribution, `focalpo` gives less weight to pairs "
        "that are already wrong, `wpo` weights pairs by how likely the policy is to write them.",
        ("cdpo", "robust", "exo_pair", "focalpo", "wpo"),
    ),
    "square": Family(
        "Targets instead of likelihoods",
        "DPO has no finite optimum on pairs that are always won by one side. A square has: it "
        "pulls the margin to a target and back. `ipo_sum` is the paper's IPO; `ipo_avg` "
        "averages log-probs over tokens, as TRL does. `sppo_*` pull each side to a target of "
        "its own, `cal_dpo` calibrates the rewards beside the likelihood, `rpo_*` imitate a "
        "reward gap that is known.",
        (
            "ipo_sum", "ipo_avg", "sppo_hard", "sppo_soft", "cal_dpo", "rpo_sq", "rpo_bwd_kl",
            "rpo_fwd_kl",
        ),
    ),
    "hinge": Family(
        "Other shapes of the margin",
        "The hinges stop at a margin. `discopop` was found by search, and at its published "
        "temperature it pushes the chosen completion down in the first steps. `bpo_sba` is a "
        "Bregman ratio matching loss.",
        ("hinge", "slic", "discopop", "bpo_sba"),
    ),
    "chosen": Family(
        "Keeping the chosen completion likely",
        "DPO only widens the gap, and often both log-probs fall. These losses bound or punish "
        "the fall: a penalty (`dpop`), less pull on the rejected side (`dpo_shift`, `bdpo`), "
        "the worse of the two sides (`bpo_balanced`), anchors for each side (`apo_*`, "
        "`nca_pair`, `bco_pair`, `kto_pair_z`), or an NLL term (`dpo_sft`, which is RPO and, "
        "with another normaliser, IRPO).",
        (
            "dpop", "dpo_shift", "bdpo", "bpo_balanced", "apo_zero", "apo_down", "nca_pair",
            "bco_pair", "kto_pair_z", "dpo_sft", "sft", "sft_token_mean",
        ),
    ),
    "divergence": Family(
        "Other divergences from the reference",
        "The regulariser is not the reverse KL: forward KL, Jensen-Shannon, alpha divergences, "
        "or KL with chi-squared (`chipo`). Their values grow as exponentials of log-ratios; far "
        "from the reference they are infinite in float32 because they are beyond its range, "
        "never NaN.",
        ("fdpo_forward_kl", "fdpo_js", "fdpo_alpha", "chipo"),
    ),
    "reference_free": Family(
        "Without a reference",
        "Half the memory and no reference pass. Averages over tokens take the place of the "
        "reference (`simpo`, `alphapo`, `simper`), odds ratios with an NLL (`orpo`), or an NLL "
        "alone keeps the policy in place (`cpo`). They need the lengths, and drift further than "
        "the losses with a reference.",
        ("simpo", "alphapo", "simper", "orpo", "cpo"),
    ),
    "tokens": Family(
        "Token by token",
        "The loss needs more than two sums: KL to the reference along each completion (`tdpo1`, "
        "`tdpo2`; the gradient flows through the KL), or the part of the log-prob beyond the "
        "shorter completion's length (`ld_dpo`). In training, `ld_dpo` is `dpo` on a score "
        "table whose weights are `ld_alpha` there.",
        ("tdpo1", "tdpo2", "ld_dpo"),
    ),
    "batch": Family(
        "Losses of a batch",
        "A pair's gradient depends on the other pairs: sorted margins (`aot_*`) or a soft worst "
        "case (`dr_dpo`). No weighted sum over micro-batches is the loss of the step, so "
        "`num_pairs` and `weight` are refused, and so is the `pairwise` plan of the head. Over "
        "ranks it is `group=torch.distributed.group.WORLD`: the pairs are gathered, each rank's "
        "loss is its part of the batch's and its gradient that of all pairs. With several ranks "
        "and no `group` these losses are an error; `group=\"local\"` makes each rank's pairs a "
        "batch of their own, which is what TRL computes.",
        ("aot_paired", "aot_unpaired", "dr_dpo"),
    ),
    "single": Family(
        "Single completions with a thumb up or down",
        "No pairs are needed. `unpaired_loss` takes one log-prob and one label an example. The "
        "shared numbers are the caller's: `kto_z` estimates KTO's `z` from mismatched pairs, and "
        "`RunningMean` keeps BCO's `delta`, the running mean of the rewards; both take the `group` "
        "of ranks whose examples they are a mean over, and are refused without it where there "
        "are several ranks. Given these numbers an example is independent of the others, so that "
        "`num_examples` makes micro-batches and ranks add up.",
        ("kto", "bco", "apo_zero_unpaired"),
    ),
    "list": Family(
        "Lists of completions",
        "`list_loss` takes K completions of a prompt: ranked (`plackett_luce`), one against "
        "many (`s_dpo`), or scored (`infonca`, `nca`). A list of two is a pair, and its loss is "
        "DPO's.",
        ("plackett_luce", "s_dpo", "infonca", "nca"),
    ),
}  # fmt: skip


def page(family: Family) -> str:
    """The Markdown page of a family: prose, formulas, what code bases call them."""
    entries = {entry.name: entry for entry in losses_table()}
    members = [entries[name] for name in family.names]
    lines = [f"# {family.title}", "", *textwrap.wrap(family.prose, 120), ""]
    lines += ["| loss | formula | paper | parameters | needs | shape |", "| --- " * 6 + "|"]
    for e in members:
        lines.append(
            f"| `{e.name}` | `{e.formula}` | {_paper(e.paper)} | {e.parameters} | {e.needs or '-'} "
            f"| {e.shape or '-'} |"
        )
    used = sorted(
        (compat, theirs, meaning.row)
        for compat, names in COMPAT.items()
        for theirs, meaning in names.items()
        if meaning.row in family.names and not meaning.refused
    )
    if used:
        lines += ["", "## What code bases call them", ""]
        lines += ["| `compat` | `loss` | computes |", "| --- | --- | --- |"]
        for compat, theirs, row in used:
            meaning = COMPAT[compat][theirs]
            notes = [f"`{k}` = {v:g}" for k, v in meaning.fixed.items()]
            notes += [f"ignores `{k}`" for k in meaning.ignores]
            notes += ["divides log-probs by lengths first"] * meaning.averages
            lines.append(f"| {compat} | `{theirs}` | {', '.join([f'`{row}`', *notes])} |")
    return "\n".join(lines) + LEGEND


LEGEND = """

## Names

`c, r`: summed log-probs of chosen and rejected under the policy; `cr, rr`: under the reference.
`xw = c - cr`, `xl = r - rr`, `D = xw - xl`, `m = beta*D`.
`nw, nl`: scored tokens; `cn = c/nw`, `rn = r/nl`. `s`: sigmoid; `sp`: softplus.

Shape: M, only `c - r` matters; c, never increasing in c; r, never decreasing in r; X, convex.

Generated by `python -m dpo_ext.torch.losses.catalogue docs/losses`.
"""


def _paper(text: str) -> str:
    """With links for arXiv ids."""
    words = [
        f"[{w}](https://arxiv.org/abs/{w.rstrip(',')})" if w[:4].isdigit() and w[4:5] == "." else w
        for w in text.split()
    ]
    return " ".join(words).replace(",](", "](").replace(") eq", "), eq").replace(") app", "), app")


def main(folder: str) -> None:
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for name, family in FAMILIES.items():
        (target / f"{name}.md").write_text(page(family), encoding="utf-8")
    lines = [
        "# Losses, one page a family",
        "",
        "![every loss and its gradients](../losses.svg)",
        "",
    ]
    lines += [
        f"- [{family.title}]({name}.md): {', '.join(f'`{x}`' for x in family.names)}"
        for name, family in FAMILIES.items()
    ]
    (target / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/losses")
