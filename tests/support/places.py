"""Where things lie: the repository and its folders, whatever folder a test is in."""

from __future__ import annotations

import os
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
TESTS = SUPPORT.parent
GOLDEN = TESTS / "golden"
ROOT = TESTS.parent
DOCS = ROOT / "docs"
SHARED = ROOT.parent / "shared"
NO_SHARED = "no ../shared beside the repository"


def child_path() -> str:
    """PYTHONPATH of a process that imports what lies in tests/support."""
    return os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")]))
