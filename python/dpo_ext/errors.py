"""Every error that dpo_ext raises by itself.

::

    DpoExtError
    ├── DataError (ValueError)           a row or an input is bad: path, line, byte, field, reason
    │   └── LimitExceeded                a documented limit was exceeded; `field` is its name
    ├── TokenizerError (ValueError)      tokenizer.json, tokenizer_config.json or the chat template
    ├── TensorError (ValueError)         a tensor has the wrong shape, dtype, device or content
    ├── KernelUnavailable (RuntimeError) no CuPy, no driver, no GPU: says what to install or change
    ├── KernelCompileError (RuntimeError) NVRTC refused a kernel: architecture, options, log
    ├── RefLogpsError (RuntimeError)     the store of reference log-probs
    └── PatchError (RuntimeError)        a code base has nothing that `dpo_ext.compat` could replace

Python's own `FileNotFoundError`, `PermissionError`, `IsADirectoryError`, `MemoryError`,
`KeyboardInterrupt` and, for a bad scalar argument, `ValueError` and `TypeError` are raised where
they fit.
"""

from __future__ import annotations

from os import PathLike, fspath
from typing import Any


class DpoExtError(Exception):
    """Base of all; raised as itself only for a bug of ours, which the message asks to report."""


class DataError(DpoExtError, ValueError):
    """A row, or a whole input, is bad.

    Attributes:
        path: the file, None for rows from memory.
        line: 1-based line of the unpacked text, of a JSON array that in which the element begins;
            for tables and rows from memory the 1-based row.
        byte: offset in the unpacked text, where known.
        field: the field, or the name of the limit.
        reason: one of the keys of ``report.dropped``, ``"bad_input"`` for an input that cannot
            be read at all, or ``"no_pairs"`` for one of which no row is kept.
    """

    def __init__(
        self,
        message: str,
        path: str | PathLike[str] | None = None,
        line: int | None = None,
        byte: int | None = None,
        field: str | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.path = None if path is None else fspath(path)
        self.line = line
        self.byte = byte
        self.field = field
        self.reason = reason

    def __reduce__(self):  # an exception crosses process borders in data workers
        return type(self), (self.args[0], self.path, self.line, self.byte, self.field, self.reason)


class LimitExceeded(DataError):  # noqa: N818 - the names of the public API
    """One of the documented limits was exceeded; ``field`` is its name."""


class TokenizerError(DpoExtError, ValueError):
    """A tokenizer or a chat template could not be loaded or used."""


class TensorError(DpoExtError, ValueError):
    """A tensor has the wrong shape, dtype, device or content."""


class KernelUnavailable(DpoExtError, RuntimeError):  # noqa: N818
    """The CUDA kernels cannot run here; the message says what to install or change."""


class KernelCompileError(DpoExtError, RuntimeError):
    """NVRTC refused a kernel; the message holds architecture, options and log."""


class RefLogpsError(DpoExtError, RuntimeError):
    """The store of reference log-probs is missing, damaged or stale."""


class PatchError(DpoExtError, RuntimeError):
    """The installed version of a code base has nothing that `dpo_ext.compat.patch` replaces."""


def describe(value: Any) -> str:
    """``float32 of shape (4, 2)`` of a tensor or an array, ``float32`` of torch's dtypes, the name
    of the type of anything else.

    >>> import numpy as np
    >>> describe(np.zeros((4, 2), np.float32)), describe([1])
    ('float32 of shape (4, 2)', 'list')
    """
    kind = type(value).__name__
    if kind == "dtype":
        return str(value).removeprefix("torch.")
    if isinstance(value, type) or not (hasattr(value, "dtype") and hasattr(value, "shape")):
        return kind
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
