"""`fingerprint`: what a reference is, from its folder or from the model in memory."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from enum import Enum
from os import PathLike
from pathlib import Path
from typing import Any

from dpo_ext.data.tokenizer import Tokenizer
from dpo_ext.errors import RefLogpsError, describe
from dpo_ext.reflogps import parameters
from dpo_ext.reflogps.identity import Fingerprint, check_part

# Of a configuration: what changes no log-prob in eval mode. All else counts.
INERT = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "initializer_factor",
        "initializer_range",
        "label2id",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "problem_type",
        "quantization_config",
        "return_dict",
        "router_aux_loss_coef",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "use_cache",
    }
)
ADAPTER_INERT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "init_lora_weights",
        "peft_version",
        "revision",
        "task_type",
    }
)
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_SETS = ("exclude_modules", "modules_to_save", "target_modules")
WRAPPERS = {"DistributedDataParallel": "module", "DataParallel": "module"}
WRAPPERS |= {"OptimizedModule": "_orig_mod"}


def fingerprint(
    reference: Any,
    *,
    adapter: str | PathLike[str] | bool | None = None,
    dtype: Any = None,
    attention: str | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    tokenizer: Any = None,
    notes: str | PathLike[str] | bool | None = None,
    **parts: Any,
) -> Fingerprint:
    """What the log-probs of a reference depend on, beside the tokens.

    That are names, shapes, dtypes and bytes of the parameters, the class, the configuration as far
    as it changes values, the adapter, quantisation, and what is given here. A folder and the model
    that transformers loads from it in the folder's dtype have one fingerprint.

    Args:
        reference: the model in memory, or its folder, with ``config.json`` and safetensors. A large
            model is better given as its folder: files are read once, and then known by size, times
            and inode as long as they stay; a copy is read anew.
        adapter: of a folder, the folder of its adapter, or False for none. Of a PEFT model, False
            if the reference is the model with its adapters off, as it is for DPO with LoRA; else
            the active ones count.
        dtype: that the reference computes in, where it is not that of its parameters (autocast).
        attention: the implementation of attention, of which values depend by rounding alone: in
            another one a store warns. Taken from a model in memory.
        temperature, softcap, logit_scale: those given to the head.
        tokenizer: a folder or a tokenizer, for a store that shall refuse another one. Without it
            other ids are other sequences, which the store does not have.
        notes: the folder that notes digests of files, by default in the user's cache; False for
            none.
        parts: whatever else the log-probs depend on: ``epoch=3`` of a reference that moves,
            ``max_length=1024`` for a store that shall refuse another truncation.

    Raises:
        RefLogpsError: the folder has no parameters that can be read, or the model in memory is
            sharded or offloaded.
        TypeError: ``reference`` is neither; or a part on which log-probs never depend, as ``beta``
            or ``layout``.
    """
    for name in parts:
        check_part(name)
    is_folder = isinstance(reference, str | PathLike)
    if not is_folder and not hasattr(reference, "state_dict"):
        raise TypeError(f"`reference` must be a model or a folder, found {describe(reference)}")
    place = _notes(notes)
    found, soft = (
        _of_folder(Path(reference), adapter, place) if is_folder else _of_model(reference, adapter)
    )
    if dtype is not None:
        found["dtype"] = str(dtype).removeprefix("torch.")
    if attention is not None:
        soft["attention"] = attention
    head = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    found["head"] = {name: v if v is None else float(v) for name, v in head.items()}
    if tokenizer is not None:
        found["tokenizer"] = _tokenizer(tokenizer)
    if taken := sorted(found.keys() & parts.keys()):
        raise TypeError(f"`{taken[0]}` is a part that `fingerprint` works out itself")
    return Fingerprint.of(Fingerprint({**found, **_plain(parts)}, soft))


def _of_folder(
    folder: Path, adapter: Any, notes: Path | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    if not folder.is_dir():
        folder.stat()  # what is missing is said by the system
        raise NotADirectoryError(20, os.strerror(20), str(folder))
    if adapter is True:
        raise TypeError("`adapter` of a folder must be the folder of the adapter")
    config = _json(folder / "config.json")
    tensors = parameters.of_files(_weights(folder), notes)
    if adapter is None and (folder / ADAPTER_CONFIG).is_file():
        raise RefLogpsError(
            f"{folder}: expected a model, found one and an adapter\n"
            "hint: say `adapter=False`, or give the folder again as `adapter=`"
        )
    found = {
        "parameters": parameters.digest_of(tensors),
        "dtype": parameters.dtypes_of(tensors),
        "architecture": str((config.get("architectures") or ["unknown"])[0]),
        "config": _filtered(config),
        "code": _code(folder, config),
        "quantization": _plain(config.get("quantization_config")),
        "adapter": _adapter_folder(Path(adapter), notes) if adapter else None,
    }
    return found, {}


def _weights(folder: Path) -> list[Path]:
    """The files that transformers reads the parameters of a model from."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        names = sorted(set(map(str, _json(index).get("weight_map", {}).values())))
        if any(Path(name).name != name for name in names):
            raise RefLogpsError(f"{index}: expected names of files in the folder")
        return [folder / name for name in names]
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    raise RefLogpsError(
        f"{folder}: expected {single.name} or {index.name}, found neither\n"
        + (
            "hint: this is an adapter; give the folder of its base, and this one as `adapter=`"
            if is_adapter
            else "hint: save the model with `save_pretrained`, or give the model itself"
        )
    )


def _code(folder: Path, config: Mapping[str, Any]) -> dict[str, str] | None:
    """Digests of the files of a model that brings its own code."""
    if "auto_map" not in config:
        return None
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.py"))
        if path.name != "__init__.py"
    }


def _adapter_folder(folder: Path, notes: Path | None) -> dict[str, Any]:
    tensors = parameters.of_files([folder / "adapter_model.safetensors"], notes)
    config = _json(folder / ADAPTER_CONFIG)
    return {"active": _adapter(config, tensors)}


def _adapter(config: Mapping[str, Any], tensors: parameters.Tensors) -> dict[str, Any]:
    return {
        "config": {
            # What is a set in memory is a list in a file.
            name: _plain(set(value)) if name in ADAPTER_SETS and isinstance(value, list) else value
            for name, value in _plain(config).items()
            if name not in ADAPTER_INERT and "dropout" not in name
        },
        "parameters": parameters.digest_of(tensors),
    }


def _of_model(model: Any, adapter: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    while (inner := WRAPPERS.get(type(model).__name__)) is not None:
        model = getattr(model, inner)
    if adapter not in (None, False, True):
        raise TypeError("`adapter` of a model in memory must be False, or left out")
    adapters: Mapping[str, Any] = getattr(model, "peft_config", None) or {}
    if adapter and not adapters:
        raise TypeError(f"the model has no adapter: it is no PEFT model, but {describe(model)}")
    base = model.get_base_model() if adapters and hasattr(model, "get_base_model") else model
    state = model.state_dict()
    config: Any = getattr(base, "config", None)
    written: dict[str, Any] = {}
    if hasattr(config, "to_json_string"):
        written = json.loads(config.to_json_string(use_diff=True))
    tensors = parameters.of_state(_base_state(state, adapters))
    found = {
        "parameters": parameters.digest_of(tensors),
        "dtype": parameters.dtypes_of(tensors),
        "architecture": type(base).__name__.removeprefix("FSDP"),
        # Of any other module its print tells sizes, activations and constants.
        "config": _filtered(written)
        if written
        else hashlib.sha256(repr(base).encode()).hexdigest(),
        "code": _code(Path(inspect.getfile(type(base))).parent, written) if written else None,
        "quantization": _plain(written.get("quantization_config")),
        "adapter": None,
    }
    active = getattr(model, "active_adapters", None) if adapters and adapter is not False else None
    if active is not None:
        names = active() if callable(active) else active
        found["adapter"] = {
            name if len(names) > 1 else "active": _adapter(
                adapters[name].to_dict(), parameters.of_state(_adapter_state(state, name))
            )
            for name in names
        }
    used = getattr(config, "_attn_implementation", None)
    return found, {} if used is None else {"attention": str(used)}


def _base_state(state: Mapping[str, Any], adapters: Mapping[str, Any]) -> dict[str, Any]:
    """What is there with the adapters off, by the names that it has in the base model."""
    if not adapters:
        return dict(state)
    base = {}
    for name, value in state.items():
        if not set(name.split(".")) & adapters.keys():
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            base[name.replace(".original_module.", ".")] = value
    return base


def _adapter_state(state: Mapping[str, Any], adapter: str) -> dict[str, Any]:
    """What an adapter brings, by the names that it has in its file."""
    return {
        ".".join(
            part for part in name.split(".") if part not in (adapter, "modules_to_save")
        ): value
        for name, value in state.items()
        if adapter in name.split(".")
    }


def _filtered(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _filtered(value) if isinstance(value, Mapping) else _plain(value)
        for name, value in config.items()
        if name not in INERT and "dropout" not in name and not name.endswith("_pdrop")
    }


def _plain(value: Any) -> Any:
    """As JSON holds it; sets in order."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_plain(inner) for inner in value), key=repr)
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, Enum):
        return _plain(value.value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value).removeprefix("torch.")


def _tokenizer(tokenizer: Any) -> str:
    ours = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.from_pretrained(tokenizer)
    return hashlib.sha256(ours.__reduce__()[1][0]).hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise RefLogpsError(f"{path}: expected JSON, found none: {error}") from error
    if not isinstance(found, dict):
        raise RefLogpsError(f"{path}: expected an object, found {describe(found)}")
    return found


def _notes(notes: str | PathLike[str] | bool | None) -> Path | None:
    if isinstance(notes, bool):
        if notes:
            raise TypeError("`notes` must be a folder, False or None")
        return None
    if notes is not None:
        return Path(notes)
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(cache) if cache else Path.home() / ".cache") / "dpo_ext" / "parameters"
    except RuntimeError:  # there is no home
        return None
