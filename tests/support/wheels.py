"""The functions of other code bases, out of their own wheels, where somebody has unpacked them.

    DPO_EXT_PEERS=folder    with one folder `NAME-VERSION` a wheel, as `unzip` leaves it

made by `pip download --no-deps NAME==VERSION` and `unzip`. Only the functions asked for are run, not
what their modules import. Nothing of theirs is in this repository; without the folder these tests
are skipped.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

FOLDER = os.environ.get("DPO_EXT_PEERS", "")
NO_PEERS = "no DPO_EXT_PEERS: no wheels of other code bases to compare with"


class Wheel(NamedTuple):
    name: str
    version: str
    path: Path

    def __str__(self) -> str:
        return f"{self.name}-{self.version}"

    def file(self, inner: str) -> Path | None:
        found = [*self.path.glob(inner), *self.path.glob(f"*.data/purelib/{inner}")]
        return found[0] if found else None


def _order(wheel: Wheel) -> tuple[int, ...]:
    return tuple(int(part) for part in wheel.version.split(".") if part.isdigit())


def wheels(name: str) -> list[Wheel]:
    """Every unpacked version of a peer, oldest first."""
    if not FOLDER:
        return []
    found = [Wheel(*path.name.rsplit("-", 1), path) for path in Path(FOLDER).glob(f"{name}-*")]
    return sorted(found, key=_order)


def names_of(
    path: Path | None, names: tuple[str, ...], given: dict[str, Any] | None = None
) -> dict:
    """Functions and classes of a source file, run alone beside the names that they may use."""
    if path is None:
        return {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kept = [
        node
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in names
    ]
    for node in kept:
        node.decorator_list = []
    import typing

    space: dict[str, Any] = {
        **vars(typing),
        "torch": torch,
        "F": F,
        "nn": nn,
        "IGNORE_INDEX": -100,
        "CROSS_ENTROPY_IGNORE_IDX": -100,
        **(given or {}),
    }
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*future, *kept], []), str(path), "exec"), space)
    return {name: space[name] for name in names if name in space}


def method_of(path: Path, class_name: str, name: str, given: dict[str, Any] | None = None):
    """One method of a class, as a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (owner,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name)
    (node,) = (n for n in owner.body if isinstance(n, ast.FunctionDef) and n.name == name)
    space = {"torch": torch, "F": F, **(given or {})}
    exec(compile(ast.Module([node], []), str(path), "exec"), space)
    return space[name]


def trl_functions(wheel: Wheel) -> dict[str, Any]:
    """TRL's functions of logits, on the path that it takes without Triton."""
    given = {
        "is_triton_available": lambda: False,
        "_fused_logprob_entropy": None,
        "maybe_gather_lm_head_ctx": lambda *_: contextlib.nullcontext(),
        "_LOGPROB_TOKEN_CHUNK_SIZE": 4,
        "TOKEN_CHUNK_SIZE": 4,
    }
    names = (
        "selective_log_softmax",
        "entropy_from_logits",
        "selective_log_softmax_and_entropy",
        "_ChunkedLogProbFunction",
        "_addmm_fp32",
    )
    path = wheel.file("trl/trainer/utils.py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:  # sizes that the classes read
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            given.setdefault(node.targets[0].id, node.value.value)
    return names_of(path, names, given)


def trl_online(wheel: Wheel):
    """``OnlineDPOTrainer._forward``, which has moved."""
    for inner in (
        "trl/experimental/online_dpo/online_dpo_trainer.py",
        "trl/trainer/online_dpo_trainer.py",
    ):
        path = wheel.file(inner)
        if path is not None and "def _forward" in path.read_text(encoding="utf-8"):
            return method_of(path, "OnlineDPOTrainer", "_forward")
    return None


def trl_kernels(wheel: Wheel):
    """``trl.kernels.ChunkedLogProbFunction`` of 1.16, which runs without Triton."""
    path = wheel.file("trl/kernels/chunked_logprob.py")
    source = path.read_text(encoding="utf-8") if path else ""
    if "_forward_tile" not in source:
        return None
    source = source.replace("from ..trainer.utils import maybe_gather_lm_head_ctx", "")
    source = source.replace("from transformers.utils import is_triton_available", "")
    space: dict[str, Any] = {
        "__name__": "peer",
        "is_triton_available": lambda: False,
        "maybe_gather_lm_head_ctx": lambda *_: contextlib.nullcontext(),
    }
    exec(compile(source, str(path), "exec"), space)
    return space["ChunkedLogProbFunction"]


def liger_modules(wheel: Wheel) -> dict[str, Any]:
    """The chunked losses, without the package's own face, which needs Triton."""
    root = wheel.file("liger_kernel")
    before = {n: m for n, m in sys.modules.items() if n.split(".")[0] == "liger_kernel"}
    for name in before:
        del sys.modules[name]
    try:
        for name, path in (
            ("liger_kernel", root),
            ("liger_kernel.chunked_loss", root / "chunked_loss"),
        ):
            module = types.ModuleType(name)
            module.__path__ = [str(path)]
            sys.modules[name] = module
        classes = {}
        for file in ("dpo", "cpo", "simpo", "orpo", "kto"):
            module = importlib.import_module(f"liger_kernel.chunked_loss.{file}_loss")
            classes.update({k: v for k, v in vars(module).items() if k.endswith("Loss")})
        return classes
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "liger_kernel"]:
            del sys.modules[name]
        sys.modules.update(before)


def torchtune_functions(wheel: Wheel) -> dict[str, Any]:
    mean = names_of(wheel.file("torchtune/rlhf/rewards.py"), ("masked_mean",))
    rlhf = types.SimpleNamespace(**mean)
    path = wheel.file("torchtune/rlhf/sequence_processing.py")
    out = names_of(path, ("get_batch_log_probs", "logits_to_logprobs"), {"rlhf": rlhf})
    return {**out, **names_of(wheel.file("torchtune/rlhf/loss/dpo.py"), ("DPOLoss",))}


def openrlhf_functions(wheel: Wheel) -> dict[str, Any]:
    names = ("log_probs_from_logits", "_logsumexp_by_chunk")
    out = names_of(wheel.file("openrlhf/models/utils.py"), names)
    return {**out, **names_of(wheel.file("openrlhf/models/loss.py"), ("DPOLoss",))}


def verl_functions(wheel: Wheel) -> dict[str, Any]:
    given = {
        "os": os,
        "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE": False,
        "NPU_CROSS_ENTROPY_LOSS_AVAILABLE": False,
    }
    names = ("logprobs_from_logits", "logprobs_from_logits_v2")
    return names_of(wheel.file("verl/utils/torch_functional.py"), names, given)


def open_instruct_functions(wheel: Wheel) -> dict[str, Any]:
    out = names_of(wheel.file("open_instruct/model_utils.py"), ("log_softmax_and_gather",))
    out |= names_of(wheel.file("open_instruct/dpo_utils.py"), ("_get_batch_logps",))
    packed = names_of(wheel.file("open_instruct/padding_free_collator.py"), ("get_batch_logps",))
    return {**out, **packed}


def llamafactory_functions(wheel: Wheel) -> dict[str, Any]:
    path = wheel.file("llamafactory/train/trainer_utils.py")
    return names_of(path, ("get_batch_logps",))


def original_functions(wheel: Wheel) -> dict[str, Any]:
    return names_of(wheel.file("trainers.py"), ("preference_loss", "_get_batch_logps"))
