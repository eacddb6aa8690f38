"""docs/head.md: its blocks run."""

import pytest
from doc_blocks import blocks, run_blocks
from places import DOCS

torch = pytest.importorskip("torch")

PAGE = DOCS / "head.md"


def test_every_python_block_runs():
    torch.manual_seed(0)
    assert len(blocks(PAGE)) == 5
    run_blocks(PAGE, {"__name__": "head"})
