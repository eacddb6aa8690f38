"""The losses in a terminal: a table of all, or one with its formula and parameters."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from difflib import get_close_matches
from shutil import get_terminal_size
from typing import Any

from dpo_ext.errors import DataError
from dpo_ext.torch.losses.catalogue import LossEntry, losses_table
from dpo_ext.torch.losses.compat import COMPAT

COLUMNS = ("loss", "called by", "arXiv", "needs")
ARXIV = re.compile(r"\d{4}\.\d{5}")
LEGEND = {
    "c, r": "summed log-probs of chosen and rejected under the policy; cr, rr: under the reference",
    "xw, xl": "c - cr, r - rr; D = xw - xl; m = beta*D",
    "nw, nl": "scored tokens; cn = c/nw, rn = r/nl",
    "s, sp": "sigmoid, softplus",
    "x": "log-ratios of one completion, or of those of a list",
}


def show_losses(name: str | None = None) -> Any:
    """Prints every loss, or one; what ``--json`` writes.

    Raises:
        DataError: there is no such loss; the hint has what was probably meant.
    """
    entries = losses_table()
    if name is None:
        _show_table(entries)
        return [_values(entry) for entry in entries]
    entry = next((entry for entry in entries if entry.name == name), None)
    if entry is None:
        raise DataError(_unknown(name, [entry.name for entry in entries]))
    _show_one(entry)
    return _values(entry)


def _values(entry: LossEntry) -> dict[str, Any]:
    values = asdict(entry)
    del values["domains"]
    return {**values, "parameters": _parameters(entry)}


def _parameters(entry: LossEntry) -> dict[str, dict[str, Any]]:
    """Default, None where the caller must give it, and domain of each parameter."""
    return {p.name: {"default": p.default, "domain": p.domain} for p in entry.domains}


def _unknown(name: str, names: Sequence[str]) -> str:
    """The message; a name that other code bases have is theirs before it is a slip of ours."""
    elsewhere: dict[str, list[str]] = {}
    for compat, table in COMPAT.items():
        meaning = table.get(name)
        if meaning is not None and not meaning.refused:
            elsewhere.setdefault(meaning.row, []).append(compat)
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    if elsewhere:
        found = [f"`{row}` in {', '.join(compats)}" for row, compats in elsewhere.items()]
        hint = f"it is {'; '.join(found)}"
    elif close:
        hint = f"did you mean {' or '.join(f'`{other}`' for other in close)}?"
    else:
        hint = "`dpo-ext losses` lists them all"
    return f"unknown loss `{name}`\nhint: {hint}"


def _arxiv(paper: str) -> str:
    found = ARXIV.search(paper)
    return found[0] if found else "-"


def _show_table(entries: Sequence[LossEntry]) -> None:
    rows = [COLUMNS, *((e.name, e.function, _arxiv(e.paper), e.needs or "-") for e in entries)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[-1]]))
    print(f"\n{len(entries)} losses; `dpo-ext losses NAME` shows formula and parameters of one")


def _show_one(entry: LossEntry) -> None:
    width = get_terminal_size().columns if sys.stdout.isatty() else 100

    def line(title: str, text: str) -> None:
        print(textwrap.fill(text, width, initial_indent=f"{title:<12}", subsequent_indent=" " * 12))

    line("loss", entry.name)
    line("called by", f'dpo_ext.torch.{entry.function}(..., loss="{entry.name}")')
    line("formula", entry.formula)
    line("paper", entry.paper)
    line("needs", entry.needs or "log-probs of the policy alone")
    for i, (name, facts) in enumerate(_parameters(entry).items()):
        default = facts["default"]
        value = "must be given" if default is None else f"{default:g} by default"
        line("" if i else "parameters", f"{name}: {facts['domain']}; {value}")
    print()
    for title, text in LEGEND.items():
        line(f"  {title}", text)
