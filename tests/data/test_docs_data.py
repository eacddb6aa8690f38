"""docs/data.md: its blocks run."""

import pytest
from doc_blocks import run_blocks
from places import DOCS

pytestmark = pytest.mark.slow

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("trl")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.usefixtures("reader_folder")
def test_every_python_block_runs():
    run_blocks(DOCS / "data.md", {"__name__": "data"})
