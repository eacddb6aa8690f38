"""From a file of preferences to the gradient of its loss. `import dpo_ext` loads NumPy alone."""

from dpo_ext._core import __version__
from dpo_ext.data.dataset import PairDataset
from dpo_ext.data.options import Limits
from dpo_ext.data.tokenizer import Tokenizer
from dpo_ext.errors import (
    DataError,
    DpoExtError,
    KernelCompileError,
    KernelUnavailable,
    LimitExceeded,
    RefLogpsError,
    TensorError,
    TokenizerError,
)
from dpo_ext.layout.batch import Batch
from dpo_ext.layout.plan import BatchPlan, PlanStats, pack_lengths
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
    "PlanStats",
    "Ragged",
    "RefLogpsError",
    "Report",
    "TensorError",
    "Tokenizer",
    "TokenizerError",
    "__version__",
    "pack_lengths",
]
