"""Draws every loss with its gradients, and the pictures of docs/derivation.md.

    python -m make_plots docs

Needs matplotlib (extra ``dev``).
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch

from dpo_ext.preference import kl_divergence, optimal_policy
from dpo_ext.torch.losses.pairs import preference_loss
from dpo_ext.torch.losses.registry import LOSSES

EXAMPLE = {
    "label_smoothing": 0.1, "score_gap": 2.5, "gamma": 0.7, "w_k": 0.5, "w_other": 0.5,
    "dr_other": 1.2,
    "dr": 1.5, "delta": 0.35, "z": 1.0, "p": 0.83, "aw": -0.35, "al": -0.8, "kw": 2.0, "kl": 3.5,
    "ld_alpha": 0.5, "tail_w": -1.0, "tail_l": -2.0, "ref_tail_w": -1.0, "ref_tail_l": -2.0,
}  # fmt: skip
LENGTH = 20  # tokens of both sides


def _axes(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "dpo_ext",
            "svg.fonttype": "none",  # text as text: searchable, and no outlines of letters
            "font.size": 7,
            "axes.grid": True,
            "grid.alpha": 0.3,
        }
    )
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, constrained_layout=True)
    return figure, axes.reshape(-1)


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, metadata=metadata)
    plt.close(figure)
    if path.suffix == ".svg":
        path.write_text(_smaller(path.read_text(encoding="utf-8")), encoding="utf-8")


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
    sheet = ElementTree.SubElement(root, f"{{{names['']}}}style")
    sheet.text = rules
    ids: dict[str, str] = {}
    return re.sub(
        r"\b[pm][0-9a-f]{10}\b",
        lambda found: ids.setdefault(found[0], f"p{len(ids)}"),
        ElementTree.tostring(root, encoding="unicode"),
    )


def draw_losses(path: Path) -> None:
    """A panel a loss: value (black), dL/dc (blue), dL/dr (red, dashed) against D, moved half by
    each side.
    """
    names = [name for name, row in LOSSES.items() if not (row.couples_batch or row.autograd)]
    columns = 7
    figure, axes = _axes(
        math.ceil(len(names) / columns), columns, (16, 2.1 * math.ceil(len(names) / columns))
    )
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    d = torch.linspace(-30, 30, 61, dtype=torch.float64)
    base = -50.0
    for axis, name in zip(axes, names, strict=False):
        row = LOSSES[name]
        params: dict[str, Any] = {
            k: EXAMPLE[k] for k, p in row.parameters.items() if p.default is None
        }
        ref = torch.full((len(d), 2), base, dtype=torch.float64)
        logps = torch.stack((base + d / 2, base - d / 2), 1).requires_grad_()
        lengths = torch.full((len(d), 2), LENGTH)
        out = preference_loss(logps, ref, loss=name, lengths=lengths, **params)
        (gradient,) = torch.autograd.grad(out.per_pair.sum(), logps)
        value = out.per_pair.detach()
        axis.plot(d, value, color="black", lw=1.2)
        axis.set_title(name, fontsize=8)
        top = np.percentile(value, 97)
        bottom = min(value.min().item(), 0.0)
        axis.set_ylim(bottom - 0.08 * (top - bottom), top + 0.08 * (top - bottom))
        slope = axis.twinx()
        slope.plot(d, gradient[:, 0], color="tab:blue", lw=0.9)
        slope.plot(d, gradient[:, 1], color="tab:red", lw=0.9, ls="--")
        reach = max(np.percentile(gradient.abs(), 97), 1e-9) * 1.15
        slope.set_ylim(-reach, reach)
        slope.tick_params(labelsize=5)
        axis.tick_params(labelsize=6)
        slope.grid(visible=False)
        axis.grid(visible=False, axis="x")
        for each in (axis, slope):
            each.locator_params(axis="y", nbins=3)
            each.set_xticks([-20, 0, 20])
    figure.suptitle(
        "loss (black, left axis), dL/dc (blue) and dL/dr (red, dashed; right axis) against D = xw "
        f"- xl, each side moved by half; both sides {LENGTH} tokens, reference {base:g} nats, "
        "default parameters (examples where there is no default)"
    )
    _save(figure, path)


def draw_kl(path: Path) -> None:
    """Both directions of KL between the reference and pi* as beta moves, and between two coins."""
    figure, axes = _axes(1, 2, (8, 3))
    ref, reward = np.array([8, 4, 2, 2]) / 16, np.log([1, 2, 4, 8])
    betas = np.geomspace(0.1, 10, 200)
    policies = torch.tensor(np.stack([optimal_policy(ref, reward, beta) for beta in betas])).log()
    reference = torch.tensor(ref).log().expand_as(policies)
    axes[0].loglog(betas, kl_divergence(policies, reference), label="KL(pi*, reference)")
    axes[0].loglog(betas, kl_divergence(reference, policies), ls="--", label="KL(reference, pi*)")
    axes[0].set_xlabel("beta")
    axes[0].set_ylabel("nats")
    axes[0].legend()
    p = torch.linspace(0.005, 0.995, 300, dtype=torch.float64)
    coin = torch.stack((p, 1 - p), 1).log()
    fair = torch.tensor([0.9, 0.1], dtype=torch.float64).log().expand_as(coin)
    axes[1].plot(p, kl_divergence(coin, fair), label="KL(p, q)")
    axes[1].plot(p, kl_divergence(fair, coin), ls="--", label="KL(q, p)")
    axes[1].set_ylim(0, 3)
    axes[1].set_xlabel("p(heads), with q(heads) = 0.9")
    axes[1].legend()
    _save(figure, path)


def draw_optimum(path: Path) -> None:
    """pi* of the integer world as beta moves from greedy to the reference."""
    figure, axes = _axes(1, 1, (6, 3))
    ref, reward = np.array([8, 4, 2, 2]) / 16, np.log([1, 2, 4, 8])
    betas = np.geomspace(0.1, 30, 200)
    policies = np.stack([optimal_policy(ref, reward, beta) for beta in betas])
    for k, name in enumerate(("00, a = 1", "01, a = 2", "10, a = 4", "11, a = 8")):
        (line,) = axes[0].semilogx(betas, policies[:, k], label=name)
        axes[0].axhline(ref[k], color=line.get_color(), ls=":", lw=0.8)
    axes[0].set_xlabel("beta (dotted: the reference)")
    axes[0].set_ylabel("pi*")
    axes[0].legend()
    _save(figure, path)


def main(folder: str) -> None:
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    draw_losses(target / "losses.svg")
    draw_kl(target / "kl.svg")
    draw_optimum(target / "optimum.svg")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs")
