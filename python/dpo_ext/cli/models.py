"""The model of a command: from its folder, in a dtype, on a device."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from dpo_ext.errors import DataError

DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_dtype(dtype: str) -> None:
    """
    Raises:
        DataError: a dtype that there is not.
    """
    if dtype not in DTYPES:
        raise DataError(
            f"unknown dtype `{dtype}`\nhint: there is {', '.join(DTYPES[:-1])} and {DTYPES[-1]}"
        )


def device_of(device: str) -> str:
    """What ``auto`` is here."""
    import torch

    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def loaded(folder: str | PathLike[str], dtype: str, device: str) -> Any:
    """The model in evaluation mode, its weights in ``dtype`` or as they are."""
    from transformers import AutoModelForCausalLM

    if not Path(folder).is_dir():
        raise FileNotFoundError(2, "no such folder", str(folder))
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype)
    return model.to(device).eval()
