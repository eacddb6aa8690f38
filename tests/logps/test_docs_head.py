"""docs/head.md: its blocks run."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from test_readme import BLOCK  # noqa: E402

PAGE = Path(__file__).resolve().parent.parent / "docs" / "head.md"


def test_every_python_block_runs():
    names = {"__name__": "head"}
    torch.manual_seed(0)
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert len(blocks) == 3
    for code in blocks:
        exec(compile(code, "head.md", "exec"), names)
