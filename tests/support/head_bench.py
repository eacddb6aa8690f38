"""What tests of benches/ share: the scripts as modules, a tiny case of the head, planning figures."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator

import torch
from places import ROOT

BENCHES = ROOT / "benches"
LLAMA = (4096, 128_256)
COPY, RATE = 4300.0, 790.0  # GB/s and TFLOP/s: the planning figures of one H200


def importable() -> Iterator[None]:
    """The scripts import each other by name, as when one of them is run."""
    sys.path[:0] = folders = [str(BENCHES), str(BENCHES / "head")]
    yield
    for folder in folders:
        sys.path.remove(folder)


def main_of_head():
    """`benches/head/__main__.py` as a module."""
    spec = importlib.util.spec_from_file_location("main_of_head", BENCHES / "head" / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny(**options):
    """A case of the head that a CPU verifies in milliseconds."""
    from cases import HeadCase, Model

    model = Model("tiny", 16, 300, options.pop("softcap", None))
    return HeadCase(model, 64, 0.4, torch.float32, torch.device("cpu"), 16, 24, **options)
