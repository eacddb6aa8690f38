"""Optional packages: which extra brings each, and what to say where one is missing."""

from __future__ import annotations

from typing import Any


def arrow(what: str) -> Any:
    """The module pyarrow, which ``what`` needs.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{what} needs pyarrow\nhint: pip install "dpo_ext[arrow]"', name="pyarrow"
        ) from error
    return pyarrow
