"""From a file of preferences to the gradient of its loss. `import dpo_ext` loads NumPy alone.

Further: `dpo_ext.torch` (log-probs, losses, loader), `dpo_ext.trl` (the trainer), `dpo_ext.compat`
(functions of other code bases), `dpo_ext.reflogps` (log-probs of a reference, stored),
`dpo_ext.arrow`, `dpo_ext.preference` (the theory), `dpo_ext.testing`; each is imported when it is
first named.
"""

from importlib import import_module
from typing import Any

from dpo_ext._core import __version__
from dpo_ext.data.dataset import PairDataset
from dpo_ext.data.options import Limits
from dpo_ext.data.prepare import prepare
from dpo_ext.data.tokenizer import Tokenizer
from dpo_ext.data.unpaired import UnpairedDataset
from dpo_ext.errors import (
    DataError,
    DpoExtError,
    KernelCompileError,
    KernelUnavailable,
    LimitExceeded,
    PatchError,
    RefLogpsError,
    TensorError,
    TokenizerError,
)
from dpo_ext.layout.batch import Batch
from dpo_ext.layout.plan import BatchPlan, PlanStats, pack_lengths
from dpo_ext.layout.unpaired import UnpairedBatch, UnpairedPlan
from dpo_ext.pairs import Ragged
from dpo_ext.report import Report

__all__ = [
    "Batch",
    "BatchPlan",
    "DataError",
    "DpoExtError",
    "KernelCompileError",
    "KernelUnavailable",
    "LimitExceeded",
    "Limits",
    "PairDataset",
    "PatchError",
    "PlanStats",
    "Ragged",
    "RefLogpsError",
    "Report",
    "TensorError",
    "Tokenizer",
    "TokenizerError",
    "UnpairedBatch",
    "UnpairedDataset",
    "UnpairedPlan",
    "__version__",
    "pack_lengths",
    "prepare",
]


def __getattr__(name: str) -> Any:
    if name in ("arrow", "compat", "preference", "reflogps", "testing", "torch", "trl"):
        return import_module(f"dpo_ext.{name}")
    raise AttributeError(f"module 'dpo_ext' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "arrow", "compat", "preference", "reflogps", "testing", "torch", "trl"]
