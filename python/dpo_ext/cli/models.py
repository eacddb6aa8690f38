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
    """The model in evaluation mode, its weights in ``dtype`` or as they are.

    Raises:
        FileNotFoundError: there is no such folder.
        DataError: it holds no causal language model, or not all of its weights; or there is no such
            device.
    """
    from transformers import AutoModelForCausalLM

    if not Path(folder).is_dir():
        raise FileNotFoundError(2, "no such folder", str(folder))
    try:
        made: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, output_loading_info=True
        )
        model: Any = made[0].to(device).eval()
    except Exception as error:  # of whatever reads weights, or of a device that is not there
        said = str(error).strip().partition("\n")[0][:200]
        said = f"{type(error).__name__}: {said}"
        raise DataError(f"{folder}: no causal language model on {device}: {said}") from error
    if missing := sorted(made[1]["missing_keys"]):
        names = ", ".join(missing[:3])
        raise DataError(
            f"{folder}: {len(missing)} weights are not in it, {names} for one, and "
            "would be random\nhint: the class that was trained may be another than the causal one"
        )
    return model
