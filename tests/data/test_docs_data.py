"""docs/data.md: its blocks run."""

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("trl")

from test_readme import BLOCK, folder  # noqa: F401 - `folder` is the reader's working folder

PAGE = Path(__file__).resolve().parent.parent / "docs" / "data.md"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_every_python_block_runs(folder, monkeypatch):  # noqa: F811
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {"__name__": "data"}
    for code in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        exec(compile(code, "data.md", "exec"), names)
