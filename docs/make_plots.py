"""Draws the pictures of docs/losses, one or two a family, and those of docs/derivation.md.

    python docs/make_plots.py

Needs matplotlib (extra ``report``). A picture brings its own background and follows the reader's
light or dark scheme.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import make_losses
import numpy as np
import torch
from torch import Tensor

from dpo_ext.preference import kl_divergence, optimal_policy
from dpo_ext.torch import list_loss, preference_loss, unpaired_loss
from dpo_ext.torch.losses.lists import LISTWISE
from dpo_ext.torch.losses.registry import LOSSES
from dpo_ext.torch.losses.single import UNPAIRED

FOLDER = Path(__file__).resolve().parent
EXAMPLE = {
    "label_smoothing": 0.1, "score_gap": 2.5, "gamma": 0.7, "w_k": 0.5, "w_other": 0.5,
    "dr_other": 1.2,
    "dr": 1.5, "delta": 0.35, "z": 1.0, "p": 0.83, "aw": -0.35, "al": -0.8, "kw": 2.0, "kl": 3.5,
    "ld_alpha": 0.5, "tail_w": -1.0, "tail_l": -2.0, "ref_tail_w": -1.0, "ref_tail_l": -2.0,
}  # fmt: skip
"""A value for each parameter without a default."""
POINTS = 61
LENGTH = 20  # tokens of both sides
START = -50.0  # the reference's log-prob of both sides

# A colour of the light scheme and that of the dark one.
PAPER, INK, GRID = "#ffffff", "#1f2328", "#d0d7de"
BLUE, RED, VIOLET, GREEN = "#0969da", "#cf222e", "#8250df", "#1a7f37"
DARK = {
    PAPER: "#0d1117", INK: "#e6edf3", GRID: "#30363d", BLUE: "#58a6ff", RED: "#ff7b72",
    VIOLET: "#d2a8ff", GREEN: "#56d364",
}  # fmt: skip


@dataclass(frozen=True)
class View:
    """What part of a loss is drawn: D from -reach to reach, the value up to ``top``, and the slopes
    on a logarithmic axis beyond ``linear``.
    """

    reach: float = 60.0
    top: float | None = None
    linear: float | None = None


VIEWS = {
    "dpop": View(10, top=6, linear=0.1),
    "fdpo_forward_kl": View(8, linear=0.1),
    "fdpo_alpha": View(14, linear=0.1),
    "chipo": View(10, linear=0.1),
    "ipo_avg": View(190),
    "sppo_soft": View(1500),
    "discopop": View(30),
    "orpo": View(95),
    "simper": View(95),
}
"""Where the usual part does not show the shape."""


@dataclass(frozen=True)
class Curves:
    """What a panel draws: values and slopes over x, each with its colour and dashes."""

    x: Tensor
    values: Sequence[tuple[Tensor, str, str]]
    slopes: Sequence[tuple[Tensor, str, str]]


def _axes(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "dpo_ext",
            "svg.fonttype": "none",  # text as text: searchable, and no outlines of letters
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.grid": True,
            "axes.facecolor": PAPER,
            "figure.facecolor": PAPER,
            "savefig.facecolor": PAPER,
            "legend.facecolor": PAPER,
            "legend.edgecolor": GRID,
            "axes.edgecolor": GRID,
            "grid.color": GRID,
            "text.color": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.prop_cycle": matplotlib.cycler(color=[BLUE, RED, VIOLET, GREEN]),
        }
    )
    figure, axes = plt.subplots(
        rows, columns, figsize=size, squeeze=False, constrained_layout=True, **options
    )
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, metadata=metadata)
    plt.close(figure)
    if path.suffix == ".svg":
        path.write_text(_smaller(path.read_text(encoding="utf-8")), encoding="utf-8")


def _in_the_dark(style: str) -> str:
    for light, dark in DARK.items():
        style = style.replace(light, dark)
    return style


def _smaller(svg: str) -> str:
    """The same picture in a quarter of the bytes: numbers to a tenth of a point, each style once,
    short names, no groups that only group.
    """
    names = {"": "http://www.w3.org/2000/svg", "xlink": "http://www.w3.org/1999/xlink"}
    for prefix, name in names.items():
        ElementTree.register_namespace(prefix, name)
    root = ElementTree.fromstring(svg)
    styles: dict[str, str] = {}

    def visit(parent: ElementTree.Element) -> None:
        children = []
        for child in parent:
            visit(child)
            tag = child.tag.rpartition("}")[2]
            if tag == "metadata":
                continue
            for key in ("d", "x", "y", "transform"):
                if key in child.attrib:
                    rounded = re.sub(r"(\d\.\d)\d+", r"\1", child.attrib[key])
                    rounded = re.sub(r"(\d)\.0(?!\d)", r"\1", rounded)
                    child.set(
                        key,
                        re.sub(r"\s*\n\s*", "", rounded)
                        .replace(" L ", "L")
                        .replace("M ", "M")
                        .strip(),
                    )
            if child.get("transform", "").startswith("rotate(-0 "):
                del child.attrib["transform"]
            style = child.attrib.pop("style", None)
            if style:
                style = re.sub(r"font-family: [^;]*", "font-family: sans-serif", style)
                child.set("class", styles.setdefault(style, f"s{len(styles)}"))
            if tag == "g":
                child.attrib.pop("id", None)
            if tag == "g" and not child.attrib:
                children += list(child)
            else:
                children.append(child)
        parent[:] = children
        for element in (parent, *parent):
            element.tail = "\n"
        if len(parent):
            parent.text = None

    visit(root)
    rules = "".join(f".{name}{{{style}}}" for style, name in styles.items())
    dark = "".join(
        f".{name}{{{_in_the_dark(style)}}}"
        for style, name in styles.items()
        if _in_the_dark(style) != style
    )
    rules += f"@media (prefers-color-scheme: dark){{{dark}}}"
    sheet = ElementTree.SubElement(root, f"{{{names['']}}}style")
    sheet.text = rules
    ids: dict[str, str] = {}
    return re.sub(
        r"\b[pm][0-9a-f]{10}\b",
        lambda found: ids.setdefault(found[0], f"p{len(ids)}"),
        ElementTree.tostring(root, encoding="unicode"),
    )


def _given(parameters: Any) -> dict[str, Any]:
    return {name: EXAMPLE[name] for name, p in parameters.items() if p.default is None}


def pair_curves(name: str, reach: float) -> Curves:
    """A loss of pairs against D, moved half by each side; dL/dc blue, dL/dr red and dashed."""
    d = torch.linspace(-reach, reach, POINTS, dtype=torch.float64)
    ref = torch.full((len(d), 2), START, dtype=torch.float64)
    logps = torch.stack((START + d / 2, START - d / 2), 1).requires_grad_()
    lengths = torch.full((len(d), 2), LENGTH)
    given = _given(LOSSES[name].parameters)
    out = preference_loss(logps, ref, loss=name, lengths=lengths, **given)
    (gradient,) = torch.autograd.grad(out.per_pair.sum(), logps)
    return Curves(
        d,
        [(out.per_pair.detach(), INK, "-")],
        [(gradient[:, 0], BLUE, "-"), (gradient[:, 1], RED, "--")],
    )


def batch_curves(name: str, reach: float) -> Curves:
    """A loss of a batch: one pair moves, four stay at D = -20, -10, 10 and 20."""
    others = torch.tensor([-20.0, -10.0, 10.0, 20.0], dtype=torch.float64)
    values, gradients = [], []
    d = torch.linspace(-reach, reach, POINTS, dtype=torch.float64)
    # the reference tells its own pairs apart, which a sort of its margins sees
    ref = START + torch.tensor([[0.0, 0], [2, -2], [-3, 3], [4, -4], [-1, 1]], dtype=torch.float64)
    lengths = torch.full((5, 2), LENGTH)
    for moved in d:
        half = torch.cat((moved.reshape(1), others)) / 2
        logps = (ref + torch.stack((half, -half), 1)).requires_grad_()
        out = preference_loss(logps, ref, loss=name, lengths=lengths, group="local")
        gradients.append(torch.autograd.grad(5 * out.loss, logps)[0][0])
        values.append(out.loss.detach())
    gradient = torch.stack(gradients)
    return Curves(
        d,
        [(torch.stack(values), INK, "-")],
        [(gradient[:, 0], BLUE, "-"), (gradient[:, 1], RED, "--")],
    )


def single_curves(name: str, reach: float) -> Curves:
    """A loss of single completions against the log-ratio: desirable blue, undesirable red."""
    x = torch.linspace(-reach, reach, POINTS, dtype=torch.float64)
    values, slopes = [], []
    for label, colour, dashes in ((1, BLUE, "-"), (0, RED, "--")):
        logps = (START + x).requires_grad_()
        labels = torch.full((len(x),), label)
        given = _given(UNPAIRED[name].parameters)
        out = unpaired_loss(logps, torch.full_like(x, START), labels, loss=name, **given)
        (gradient,) = torch.autograd.grad(out.per_example.sum(), logps)
        values.append((out.per_example.detach(), colour, dashes))
        slopes.append((gradient, colour, dashes))
    return Curves(x, values, slopes)


def list_curves(name: str, reach: float) -> Curves:
    """A loss of lists of three: the first moves; its slope blue, that of the last red."""
    x = torch.linspace(-reach, reach, POINTS, dtype=torch.float64)
    ref = torch.full((len(x), 3), START, dtype=torch.float64)
    rest = torch.tensor([5.0, -5.0], dtype=torch.float64).expand(len(x), 2)
    logps = (ref + torch.cat((x[:, None], rest), 1)).requires_grad_()
    scores = torch.tensor([2.0, 1.0, 0.0]).expand(len(x), 3)
    scored = scores if "alpha" in LISTWISE[name].parameters else None
    out = list_loss(logps, ref, scored, loss=name)
    (gradient,) = torch.autograd.grad(out.per_example.sum(), logps)
    return Curves(
        x,
        [(out.per_example.detach(), INK, "-")],
        [(gradient[:, 0], BLUE, "-"), (gradient[:, 2], RED, "--")],
    )


def _kind(name: str) -> tuple[Callable[[str, float], Curves], str]:
    """How a loss is drawn, and what the picture says below."""
    if name in UNPAIRED:
        return single_curves, (
            "Against the log-ratio of the completion: desirable (blue), undesirable (red, dashed)."
        )
    if name in LISTWISE:
        return list_curves, (
            "Against the log-ratio of the first of three, the others at 5 and -5; "
            "below the slope of the first (blue) and of the last (red, dashed)."
        )
    below = "below dL/dc (blue) and dL/dr (red, dashed)."
    if LOSSES[name].couples_batch:
        return batch_curves, (
            f"Against D of one pair of five, the others at -20, -10, 10, 20; above the loss of the "
            f"batch, {below}"
        )
    return pair_curves, (
        f"Against D = xw - xl, moved half by each side, both of {LENGTH} tokens; above the loss, "
        f"{below}"
    )


def draw_family(path: Path, names: Sequence[str]) -> None:
    """Two panels a loss, one over the other: its value and its slopes."""
    columns = 2 if len(names) in (2, 4) else 3
    rows = -(-len(names) // columns)
    figure, axes = _axes(2 * rows, columns, (9.0, 3.1 * rows + 0.5), height_ratios=[3, 2] * rows)
    for place, name in enumerate(names):
        row, column = divmod(place, columns)
        _draw_loss(axes[2 * row, column], axes[2 * row + 1, column], name)
    for place in range(len(names), rows * columns):
        row, column = divmod(place, columns)
        axes[2 * row, column].set_axis_off()
        axes[2 * row + 1, column].set_axis_off()
    notes = list(dict.fromkeys(_kind(name)[1] for name in names))
    figure.supxlabel("\n".join(notes), fontsize=9)
    _save(figure, path)


def _draw_loss(above: Any, below: Any, name: str) -> None:
    view = VIEWS.get(name, View())
    curves = _kind(name)[0](name, view.reach)
    for axis, lines in ((above, curves.values), (below, curves.slopes)):
        for y, colour, dashes in lines:
            axis.plot(curves.x, y, color=colour, ls=dashes, lw=1.6)
        axis.set_xlim(-view.reach, view.reach)
        axis.locator_params(axis="x", nbins=5)
    above.locator_params(axis="y", nbins=4)
    above.set_title(name)
    above.tick_params(labelbottom=False)
    if view.top is not None:
        bottom = min(y.min().item() for y, _, _ in curves.values)
        above.set_ylim(bottom - 0.05 * (view.top - bottom), view.top)
    if view.linear is not None:
        below.set_yscale("symlog", linthresh=view.linear)
        below.set_yticks(ticks := [-10, -1, -0.1, 0.1, 1, 10], [f"{tick:g}" for tick in ticks])
        reach = 1.3 * max(y.abs().max().item() for y, _, _ in curves.slopes)
        below.set_ylim(-reach, reach)
        below.minorticks_off()
    else:
        below.locator_params(axis="y", nbins=4)


def draw_kl(path: Path) -> None:
    """Both directions of KL between the reference and pi* as beta moves, and between two coins."""
    figure, axes = _axes(1, 2, (8, 3))
    ref, reward = np.array([8, 4, 2, 2]) / 16, np.log([1, 2, 4, 8])
    betas = np.geomspace(0.1, 10, 200)
    policies = torch.tensor(np.stack([optimal_policy(ref, reward, beta) for beta in betas])).log()
    reference = torch.tensor(ref).log().expand_as(policies)
    axes[0, 0].loglog(betas, kl_divergence(policies, reference), label="KL(pi*, reference)")
    axes[0, 0].loglog(
        betas, kl_divergence(reference, policies), ls="--", label="KL(reference, pi*)"
    )
    axes[0, 0].set_xlabel("beta")
    axes[0, 0].set_ylabel("nats")
    axes[0, 0].legend()
    p = torch.linspace(0.005, 0.995, 300, dtype=torch.float64)
    coin = torch.stack((p, 1 - p), 1).log()
    fair = torch.tensor([0.9, 0.1], dtype=torch.float64).log().expand_as(coin)
    axes[0, 1].plot(p, kl_divergence(coin, fair), label="KL(p, q)")
    axes[0, 1].plot(p, kl_divergence(fair, coin), ls="--", label="KL(q, p)")
    axes[0, 1].set_ylim(0, 3)
    axes[0, 1].set_xlabel("p(heads), with q(heads) = 0.9")
    axes[0, 1].legend()
    _save(figure, path)


def draw_optimum(path: Path) -> None:
    """pi* of the integer world as beta moves from greedy to the reference."""
    figure, axes = _axes(1, 1, (6, 3))
    ref, reward = np.array([8, 4, 2, 2]) / 16, np.log([1, 2, 4, 8])
    betas = np.geomspace(0.1, 30, 200)
    policies = np.stack([optimal_policy(ref, reward, beta) for beta in betas])
    for k, name in enumerate(("00, a = 1", "01, a = 2", "10, a = 4", "11, a = 8")):
        (line,) = axes[0, 0].semilogx(betas, policies[:, k], label=name)
        axes[0, 0].axhline(ref[k], color=line.get_color(), ls=":", lw=0.8)
    axes[0, 0].set_xlabel("beta (dotted: the reference)")
    axes[0, 0].set_ylabel("pi*")
    axes[0, 0].legend()
    _save(figure, path)


def main(folder: Path = FOLDER) -> None:
    (folder / "losses").mkdir(parents=True, exist_ok=True)
    for family in make_losses.FAMILIES:
        for file, names in make_losses.pictures(family):
            draw_family(folder / "losses" / file, names)
    draw_kl(folder / "kl.svg")
    draw_optimum(folder / "optimum.svg")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
