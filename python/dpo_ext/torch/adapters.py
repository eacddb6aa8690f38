"""The adapter that PEFT puts on a head, as the low-rank term of the linear head.

Letters: H hidden, V vocabulary, r rank of one adapter. Nothing here imports PEFT: a layer is known
by what it has, and the comparison of `attach_scoring` says whether that was right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_ext.errors import TensorError
from dpo_ext.torch.logps.lowrank import LowRank
from dpo_ext.torch.logps.products import HALVES, part, tiles
from dpo_ext.torch.logps.scores import is_dtensor

_HINT = "\nhint: leave the head out of `target_modules`, or put it into `modules_to_save`"


class Adapted(NamedTuple):
    """What lies below an adapter, and what the adapter adds.

    - ``base``: the layer that is adapted.
    - ``low``: the product beside its own; None while no adapter is active, or all are merged.
    - ``shift``: (V,) what adapters with a bias of their own add to each logit, or None.
    """

    base: nn.Module
    low: LowRank | None = None
    shift: Tensor | None = None


def adapted(layer: Any) -> Adapted:
    """LoRA and DoRA of a linear layer, as they are now.

    Raises:
        TensorError: the adapter is of another kind or its base is quantised, or the layer would do
            something that no product is, dropout in training for example.
    """
    base = layer.base_layer
    _check_kind(layer, base)
    if layer.merged:
        if layer.disable_adapters:
            raise _not_a_product("its merged adapters are taken out by its own next call")
        return Adapted(base)
    names = (
        [] if layer.disable_adapters else [n for n in layer.active_adapters if n in layer.lora_A]
    )
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    columns: Tensor | None = None
    shift: Tensor | None = None
    for name in names:
        a, b = _matrices(layer, name)
        scaling = float(layer.scaling[name])
        up, own = b.weight, b.bias
        if _is_dora(layer, name):  # it scales what the adapters before it gave, too
            if own is not None:
                raise _not_a_product("it is DoRA with a bias of its own")
            c = _wide(_columns(layer, name, scaling))
            columns = c if columns is None else columns * c
            shift = None if shift is None else shift * c
            ups = [c[:, None] * u for u in (*ups, up)]
        else:
            ups.append(up)
        if own is not None:
            shift = scaling * _wide(own) if shift is None else shift + scaling * own
        exact = math.frexp(scaling)[0] == 0.5  # a power of 2 rounds nothing
        downs.append(scaling * (a.weight if exact else _wide(a.weight)))
    if not names:
        return Adapted(base)
    return Adapted(base, LowRank(_side_by_side(downs, 0), _side_by_side(ups, 1), columns), shift)


def _wide(t: Tensor) -> Tensor:
    """Half width as float32, so that a factor rounds nothing."""
    return t.float() if t.dtype in HALVES else t


def _side_by_side(matrices: list[Tensor], dim: int) -> Tensor:
    if len(matrices) == 1:
        return matrices[0]
    if len({t.dtype for t in matrices}) > 1:
        matrices = [_wide(t) for t in matrices]
    return torch.cat(matrices, dim)


def adapter_state(layer: Any) -> tuple[Any, ...]:
    """What a comparison of an adapted layer was made for; values are read at each call."""
    if not hasattr(layer, "base_layer") or not isinstance(
        getattr(layer, "lora_A", None), nn.ModuleDict
    ):
        return ()
    names = tuple(map(str, layer.active_adapters))
    here = [name for name in names if name in layer.lora_A]
    parts = [layer.base_layer, *(m[n] for n in here for m in (layer.lora_A, layer.lora_B))]
    hooks = [key for m in parts for some in _hooks(m) for key in some]
    drops = any(_drops(layer, name) for name in here)
    kinds = tuple(_kind(layer, name) for name in here)
    return (names, bool(layer.disable_adapters), tuple(layer.merged_adapters), kinds, drops, *hooks)


def _hooks(module: nn.Module) -> Iterator[Any]:
    return (vars(module).get(name, ()) for name in ("_forward_hooks", "_forward_pre_hooks"))


def _not_a_product(why: str) -> TensorError:
    return TensorError(
        f"the output head carries an adapter, whose product is not part of its weight: {why}{_HINT}"
    )


def _check_kind(layer: Any, base: Any) -> None:
    kind = type(layer).__name__
    wanted = ("lora_A", "lora_B", "scaling", "lora_dropout", "active_adapters", "disable_adapters")
    if not all(hasattr(layer, name) for name in wanted) or not hasattr(layer, "merged"):
        raise _not_a_product(f"{kind} is neither LoRA nor DoRA")
    if not all(isinstance(part, nn.ModuleDict) for part in (layer.lora_A, layer.lora_B)):
        raise _not_a_product(f"the matrices of {kind} are no layers")  # AdaLoRA's
    if hasattr(base, "base_layer") or hasattr(base, "modules_to_save"):
        raise _not_a_product("there is another wrapper below it")
    weight = getattr(base, "weight", None)
    plain = type(weight) in (Tensor, nn.Parameter) or is_dtensor(weight)
    if not plain or not weight.is_floating_point():  # type: ignore[union-attr]
        raise _not_a_product(f"its base is quantised ({type(base).__name__})")
    if getattr(layer, "fan_in_fan_out", False):
        raise _not_a_product("its base has a transposed weight (fan_in_fan_out)")


def _kind(layer: Any, name: str) -> str:
    """The class of what PEFT runs in place of plain LoRA, or "" ."""
    variant = getattr(layer, "lora_variant", {}).get(name)
    if variant is None and getattr(layer, "use_dora", {}).get(name):
        return "DoraLinearVariant"
    return "" if variant is None else type(variant).__name__


def _is_dora(layer: Any, name: str) -> bool:
    return _kind(layer, name) == "DoraLinearVariant"


def _drops(layer: Any, name: str) -> bool:
    if name not in layer.lora_dropout:
        return False
    drop = layer.lora_dropout[name]
    if isinstance(drop, nn.Identity):
        return False
    return drop.training and getattr(drop, "p", 1.0) > 0


def _matrices(layer: Any, name: str) -> tuple[Any, Any]:
    """The two layers of one adapter, (r, H) and (V, r)."""
    kind = _kind(layer, name)
    if kind and kind != "DoraLinearVariant":
        raise _not_a_product(f"its variant is {kind}")
    if _drops(layer, name):
        raise _not_a_product("its dropout acts in training")
    pair = layer.lora_A[name], layer.lora_B[name]
    for module in pair:
        weight = module.weight
        if type(module) is not nn.Linear or weight.dim() != 2 or not weight.is_floating_point():
            raise _not_a_product(f"one of its matrices is a {type(module).__name__}")
        if is_dtensor(weight):
            raise _not_a_product("one of its matrices is a DTensor, sharded by itself")
        if weight.device != layer.base_layer.weight.device or not weight.numel():
            raise _not_a_product("one of its matrices is elsewhere")
    return pair


def _columns(layer: Any, name: str, scaling: float) -> Tensor:
    """(V,) of DoRA: magnitude over the norm of each row of the adapted weight, whose own gradient
    DoRA leaves out (section 4.3 of its paper).
    """
    weight = layer.base_layer.weight
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    magnitude = layer.lora_magnitude_vector[name]
    magnitude = getattr(magnitude, "weight", magnitude)
    if is_dtensor(magnitude):
        raise _not_a_product("its magnitude is a DTensor, sharded by itself")
    with torch.no_grad():
        norms = [
            torch.linalg.norm(
                part(weight, tile).to(down.dtype)
                + scaling * (part(up, tile) @ down).to(down.dtype),
                dim=1,
            )
            for tile in tiles(weight.shape[0])
        ]
    columns: Tensor = magnitude / torch.cat(norms)
    return columns
