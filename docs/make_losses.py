"""Writes the pages of docs/losses from the table of the losses.

    python docs/make_losses.py            writes them
    python docs/make_losses.py --check    says which differ from the table, and exits with 1

The pictures on them are drawn by make_plots.py, which takes the families from here.
"""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from dpo_ext.torch.losses.catalogue import LossEntry, losses_table
from dpo_ext.torch.losses.compat import COMPAT

FOLDER = Path(__file__).resolve().parent / "losses"
PANELS = 6  # of a picture, at most


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
        "`num_examples` makes micro-batches and ranks add up. The data, the mismatched completions "
        "and a whole loop: [kto.md](../kto.md).",
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

LETTERS = {
    "only the margin": "M",
    "falls in chosen": "c",
    "rises in rejected": "r",
    "convex": "X",
}
LEGEND = """
## Names

`c, r`: summed log-probs of chosen and rejected under the policy; `cr, rr`: under the reference.
`xw = c - cr`, `xl = r - rr`, `D = xw - xl`, `m = beta*D`.
`nw, nl`: scored tokens; `cn = c/nw`, `rn = r/nl`. `s`: sigmoid; `sp`: softplus.

Shape: M, only `c - r` matters; c, never increasing in c; r, never decreasing in r; X, convex.

Generated by `python docs/make_losses.py`; the pictures by `python docs/make_plots.py`.
"""

OF_YOUR_OWN = """
## A loss of your own

A function of `(logps, ref_logps)`, each (N, 2) with the chosen side first, and of `lengths` third where it is
registered with `lengths=True`. It returns the loss of each pair, (N,), or a scalar; autograd differentiates it. The
parameters behind the log-probs are the loss's: a number is the default, without one the caller must give it.
`replace=True` lets the cell of a notebook run again.

```python
import torch

from dpo_ext.torch import preference_loss, register_loss


@register_loss("square_gap", replace=True, only_margin=True, text="L = (beta*D - target)**2")
def square_gap(logps, ref_logps, target, beta=0.1):
    chosen, rejected = (logps - ref_logps).unbind(1)
    return (beta * (chosen - rejected) - target) ** 2


logps, ref_logps = torch.tensor([[-9.0, -12.0]], requires_grad=True), torch.tensor([[-10.0, -11.0]])
preference_loss(logps, ref_logps, loss="square_gap", target=0.5).loss.backward()
```

`dpo_ext.testing.check_loss_invariants("square_gap", parameters={"target": 0.5})` holds it to what it claims
(`only_margin`) and to what holds for every loss; `dpo-ext losses` lists it where its module is imported.
"""


def pictures(name: str) -> list[tuple[str, tuple[str, ...]]]:
    """File name and losses of each picture of a family, as even as can be."""
    names = FAMILIES[name].names
    parts = math.ceil(len(names) / PANELS)
    size = math.ceil(len(names) / parts)
    cut = [names[i : i + size] for i in range(0, len(names), size)]
    return [
        (f"{name}.svg" if parts == 1 else f"{name}-{i}.svg", part) for i, part in enumerate(cut, 1)
    ]


def page(name: str) -> str:
    """The Markdown page of a family: prose, pictures, formulas, what code bases call them."""
    family = FAMILIES[name]
    entries = {entry.name: entry for entry in losses_table()}
    lines = [f"# {family.title}", "", *textwrap.wrap(family.prose, 120), ""]
    for file, names in pictures(name):
        lines += [f"![{', '.join(names)}: value and slopes]({file})", ""]
    lines += ["| loss | formula | paper | parameters | needs | shape |", "| --- " * 6 + "|"]
    lines += [_row(entries[loss]) for loss in family.names]
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
    return "\n".join(lines) + "\n" + LEGEND


def index() -> str:
    """The page that lists the families."""
    lines = ["# Losses, one page a family", ""]
    lines += [
        f"- [{family.title}]({name}.md): {', '.join(f'`{x}`' for x in family.names)}"
        for name, family in FAMILIES.items()
    ]
    return "\n".join(lines) + "\n" + OF_YOUR_OWN


def pages() -> dict[str, str]:
    """Every page by its file name."""
    return {"README.md": index(), **{f"{name}.md": page(name) for name in FAMILIES}}


def stale(folder: Path) -> list[str]:
    """What is not as the table has it: pages that differ, pages and pictures amiss."""
    made = pages()
    drawn = {file for name in FAMILIES for file, _ in pictures(name)}
    found = {path.name for path in folder.iterdir()}
    wrong = [
        file
        for file, text in made.items()
        if file not in found or (folder / file).read_text(encoding="utf-8") != text
    ]
    return sorted({*wrong, *(found ^ {*made, *drawn})})


def _row(entry: LossEntry) -> str:
    shape = " ".join(LETTERS[words] for words in entry.shape.split(", ") if words)
    return (
        f"| `{entry.name}` | `{entry.formula}` | {_paper(entry.paper)} | {entry.parameters} "
        f"| {entry.needs or '-'} | {shape or '-'} |"
    )


def _paper(text: str) -> str:
    """With links for arXiv ids."""
    words = [
        f"[{w}](https://arxiv.org/abs/{w.rstrip(',')})" if w[:4].isdigit() and w[4:5] == "." else w
        for w in text.split()
    ]
    return " ".join(words).replace(",](", "](").replace(") eq", "), eq").replace(") app", "), app")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the pages of docs/losses from the table.")
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    given = parser.parse_args(arguments)
    if given.check:
        wrong = stale(given.folder)
        for file in wrong:
            print(f"docs/losses/{file} is not what `make docs` writes", file=sys.stderr)
        return 1 if wrong else 0
    given.folder.mkdir(parents=True, exist_ok=True)
    for file, text in pages().items():
        (given.folder / file).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
