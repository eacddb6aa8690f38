"""Optional packages: which extra brings each; the one place that says what to install."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from dpo_ext import _core

# Top-level module to the extra of pyproject.toml that brings it; where two do, the smaller one.
EXTRAS = {
    "torch": "torch",
    "pyarrow": "arrow",
    "datasets": "hf",
    "jinja2": "hf",
    "tokenizers": "hf",
    "transformers": "hf",
    "trl": "trl",
    "lightning": "lightning",
    "rich": "cli",
    "typer": "cli",
    "hypothesis": "testing",
}


def extra_of(module: str | None) -> str | None:
    """The extra that brings a module, None if no extra does.

    >>> extra_of("pyarrow.parquet")
    'arrow'
    """
    return EXTRAS.get((module or "").partition(".")[0])


def install(extra: str) -> str:
    """The command that installs an extra.

    >>> install("cli")
    'pip install "dpo_ext[cli]"'
    """
    return f'pip install "dpo_ext[{extra}]"'


def install_other(distribution: str) -> str:
    """The command that installs what no extra brings, a code base that `dpo_ext.compat` knows.

    >>> install_other("verl")
    'pip install verl'
    """
    return f"pip install {distribution}"


def need(module: str, what: str) -> Any:
    """The module, which ``what`` needs.

    Raises:
        ModuleNotFoundError: it is not installed; the message names ``what`` and the extra. What an
            installed module lacks itself is raised as it is.
    """
    if (found := sys.modules.get(module)) is not None and not _is_half(found):
        return found
    # In a child that is forked in the middle of an import, the module would be locked for ever.
    _core.begin_section()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != top:
            raise
        raise ModuleNotFoundError(
            f"{what} needs {top}\nhint: {install(EXTRAS[top])}", name=top
        ) from error
    finally:
        _core.end_section()


def _is_half(module: Any) -> bool:
    """Whether another thread is still importing it."""
    return getattr(getattr(module, "__spec__", None), "_initializing", False)


def arrow(what: str) -> Any:
    """The module pyarrow, which ``what`` needs.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    return need("pyarrow", what)


def cupy(major: str) -> str:
    """The command that installs CuPy for a major version of CUDA, and the extra that does."""
    return f"pip install cupy-cuda{major}x, or dpo_ext[cuda{major}]"


def other_cupy(major: str, installed: str | None = None) -> str:
    """The command that puts the CuPy of a major version of CUDA in the place of another."""
    if installed is None:
        return f"pip install cupy-cuda{major}x in its place"
    return f"pip uninstall cupy-cuda{installed}x, then pip install cupy-cuda{major}x"


def cuda_toolkit(major: str) -> str:
    """The command that adds CUDA's headers and NVRTC to CuPy."""
    return f"pip install 'cupy-cuda{major}x[ctk]'"
