"""What counts as one number: Python's, NumPy's, and tensors without dimensions; never a bool."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dpo_ext.errors import describe

_FUNCTORCH = torch._C._functorch  # noqa: SLF001 - torch.func has no public way to ask
_ACTIVE = torch._C._are_functorch_transforms_active  # noqa: SLF001


def transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work."""
    return _ACTIVE()


def in_dual_level() -> bool:
    """Whether tensors may carry a tangent of ``torch.autograd.forward_ad``."""
    return forward_ad._current_level >= 0  # noqa: SLF001 - torch has no public name for it


def derivatives(tensor: Tensor) -> int:
    """How many transforms of ``torch.func`` differentiate by a tensor."""
    count = 0
    while _FUNCTORCH.is_functorch_wrapped_tensor(tensor):
        count += _FUNCTORCH.is_gradtrackingtensor(tensor)
        tensor = _FUNCTORCH.get_unwrapped(tensor)
    return count


def host_values(tensor: Tensor) -> bool:
    """Whether the values of a tensor may be looked at: not those of a device, which wait for it,
    nor those that a compiler or vmap has no numbers for.
    """
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not (transformed() and _batched(tensor))


def _batched(tensor: Tensor) -> bool:
    while _FUNCTORCH.is_functorch_wrapped_tensor(tensor):
        if _FUNCTORCH.is_batchedtensor(tensor):
            return True
        tensor = _FUNCTORCH.get_unwrapped(tensor)
    return False


def as_number(name: str, value: Any) -> Any:
    """A float or an int where the value is one number that may be looked at; else the value itself.

    Same as ``value.item()`` of NumPy's scalars and of arrays and tensors without dimensions. A
    tensor on a device stays one, and so does one that asks for a gradient.

    Raises:
        TypeError: a bool, in any of these forms.

    >>> import numpy as np
    >>> as_number("beta", np.float32(0.5)), as_number("beta", torch.tensor(2))
    (0.5, 2)
    """
    if isinstance(value, bool):
        raise TypeError(f"`{name}` must be a number, found bool")
    if isinstance(value, (float, int)):
        return value
    if getattr(value, "ndim", None) != 0 or not hasattr(value, "dtype"):
        return value
    if str(value.dtype) in ("bool", "torch.bool"):
        raise TypeError(f"`{name}` must be a number, found {describe(value)}")
    if isinstance(value, Tensor) and (value.requires_grad or not host_values(value)):
        return value
    return value.item()
