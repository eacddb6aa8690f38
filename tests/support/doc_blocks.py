"""The fenced python blocks of a page, for the tests that run them."""

from __future__ import annotations

import re
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[str]:
    """Their code, in order."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def run_blocks(page: Path, names: dict) -> None:
    """Runs them in one namespace, in order."""
    for code in blocks(page):
        exec(compile(code, str(page), "exec"), names)
