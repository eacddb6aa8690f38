"""`benches/scale.py` measures every step it names, on few pairs."""

import subprocess
import sys

import pytest
from places import ROOT

pytest.importorskip("pyarrow")
pytestmark = pytest.mark.slow


def test_every_step_gives_a_row():
    run = subprocess.run(
        [sys.executable, "benches/scale.py", "--pairs", "320", "--text", "192"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.split("|") for line in run.stdout.splitlines() if line.startswith("| ")][2:]
    sizes = {cells[1].strip(): float(cells[-2]) for cells in rows}
    assert len(sizes) == 7
    assert sizes["put reference log-probs"] > 48, "two rows of 24 bytes a pair"
    assert all(cells[2].strip().startswith(("320", "192")) for cells in rows)
