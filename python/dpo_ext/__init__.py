"""dpo_ext: from a file of preferences to the gradient of its loss. `import dpo_ext` loads NumPy alone."""

from dpo_ext._core import __version__
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

__all__ = [
    "DataError",
    "DpoExtError",
    "KernelCompileError",
    "KernelUnavailable",
    "LimitExceeded",
    "RefLogpsError",
    "TensorError",
    "TokenizerError",
    "__version__",
]
