"""What a preference loss accepts: shapes, dtypes and devices always; values only where looking at
them costs nothing.

A value of a CUDA tensor is never looked at, because that waits for the device; neither is one under
``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dpo_ext.errors import TensorError, describe
from dpo_ext.torch.logps.scores import check_plain
from dpo_ext.torch.losses.forms import Number
from dpo_ext.torch.losses.row import LossRow, Parameter, non_negative
from dpo_ext.torch.numbers import as_number, host_values

SIDES = ("chosen", "rejected")
_WEIGHT = non_negative()


def check_log_probs(logps: Tensor) -> None:
    check_plain("logps", logps)
    if logps.dim() != 2 or logps.shape[1] != 2 or logps.dtype not in (torch.float32, torch.float64):
        hint = (
            "\nhint: use `logps.float()`" if logps.dtype in (torch.float16, torch.bfloat16) else ""
        )
        raise TensorError(
            f"`logps` must be float32 or float64 of shape (N, 2), found {describe(logps)}{hint}"
        )


def check_reference(ref_logps: Tensor, logps: Tensor) -> None:
    check_plain("ref_logps", ref_logps)
    if ref_logps.shape != logps.shape or ref_logps.dtype != logps.dtype:
        cast = ref_logps.shape == logps.shape and ref_logps.is_floating_point()
        hint = "\nhint: use `ref_logps.to(logps.dtype)`" if cast else ""
        raise TensorError(
            f"`ref_logps` must be {describe(logps)} as `logps`, found {describe(ref_logps)}{hint}"
        )
    _check_device("ref_logps", ref_logps, logps)
    if ref_logps.requires_grad:
        raise TensorError(
            "`ref_logps` asks for a gradient, and the reference is frozen\n"
            "hint: compute it under `torch.no_grad()`, or pass `ref_logps.detach()`"
        )


def check_lengths(lengths: Tensor, logps: Tensor) -> None:
    check_plain("lengths", lengths)
    if lengths.shape != logps.shape or lengths.dtype in (torch.bool, torch.complex64):
        raise TensorError(
            f"`lengths` must be integers of shape {tuple(logps.shape)}, found {describe(lengths)}"
        )
    _check_device("lengths", lengths, logps)
    if host_values(lengths):
        # a sequence without a scored token has the sum 0 and the average 0
        bad = (lengths < 1) & ((lengths < 0) | (logps.detach() != 0))
        if bad.any():
            pair, side = bad.nonzero()[0].tolist()
            raise TensorError(
                f"pair {pair}: `lengths` must be >= 1 for {SIDES[side]} with log-prob "
                f"{logps[pair, side].item():g}, found {lengths[pair, side].item():g}"
            )


def bind_parameters(row: LossRow, given: Mapping[str, Any], logps: Tensor) -> dict[str, Number]:
    """The parameters of a row: what was given, checked and converted, and the row's defaults.

    Raises:
        ValueError: a parameter is missing, unknown or outside its domain.
        TensorError: an array of them has another shape than (N,), or is elsewhere.
    """
    bound: dict[str, Number] = {}
    known = 0
    for name, parameter in row.parameters.items():
        if name in given:
            known += 1
            bound[name] = convert_parameter(name, given[name], parameter, logps, row.differentiable)
        elif parameter.default is None:
            raise ValueError(
                f"loss {row.name!r} needs `{name}` ({parameter.domain}): {row.text or row.paper}"
            )
        else:
            bound[name] = parameter.default
    if len(given) != known:
        unknown = next(name for name in given if name not in row.parameters)
        has = ", ".join(f"`{name}`" for name in row.parameters) or "no parameter"
        raise ValueError(f"loss {row.name!r} has no parameter `{unknown}`\nhint: it has {has}")
    return bound


def convert_parameter(
    name: str, value: Any, parameter: Parameter, logps: Tensor, differentiable: tuple[str, ...] = ()
) -> Number:
    """A float, or a tensor (N,) in the dtype and on the device of the log-probs."""
    value = as_number(name, value)
    if isinstance(value, (float, int)):
        if not parameter.contains(value):
            raise ValueError(f"`{name}` must be {parameter.domain}, found {value!r}")
        return float(value)
    N = logps.shape[0]
    if not isinstance(value, Tensor):
        try:
            if str(getattr(value, "dtype", "")) == "bool" or any(
                v is True or v is False for v in value
            ):
                raise TypeError("a bool is no number")
            value = torch.as_tensor(value, dtype=logps.dtype, device=logps.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"`{name}` must be one number or {N}, found {describe(value)}"
            ) from error
    if value.dtype == torch.bool:
        raise TypeError(f"`{name}` must be one number or {N}, found {describe(value)}")
    single = value.dim() == 0
    if single:
        value = value.expand(N)
    if not parameter.per_pair and not single:
        raise ValueError(f"`{name}` must be {parameter.domain} for all pairs, found an array")
    if value.shape != logps.shape[:1] or value.is_complex():
        raise TensorError(f"`{name}` must be a number or of shape ({N},), found {describe(value)}")
    if value.requires_grad and name not in differentiable:
        raise TensorError(
            f"`{name}` asks for a gradient, which this loss does not give\n"
            f"hint: pass `{name}.detach()`"
        )
    _check_device(name, value, logps)
    value = value.to(logps.dtype)
    if host_values(value):
        inside = parameter.contains(value)
        if not inside.all():
            pair = int((~inside).nonzero()[0])
            raise ValueError(
                f"pair {pair}: `{name}` must be {parameter.domain}, found {value[pair].item():g}"
            )
    return value


def check_weight(weight: Any, logps: Tensor) -> Tensor:
    """The weight of each pair, (N,)."""
    value = convert_parameter("weight", weight, _WEIGHT, logps)
    return value if isinstance(value, Tensor) else logps.new_full((logps.shape[0],), value)


def check_count(name: str, count: float | Tensor) -> float | Tensor:
    """What replaces the number of pairs, examples or lists in a mean."""
    if isinstance(count, Tensor) and count.numel() == 1 and count.dim():
        count = count.reshape(())
    count = as_number(name, count.detach() if isinstance(count, Tensor) else count)
    if isinstance(count, Tensor):
        if count.dim():
            raise TensorError(f"`{name}` must be one number, found {describe(count)}")
        return count
    if not isinstance(count, (float, int)):
        raise TypeError(f"`{name}` must be one number, found {describe(count)}")
    if not count > 0:
        raise ValueError(f"`{name}` must be > 0, found {count!r}")
    return float(count)


def _check_device(name: str, tensor: Tensor, logps: Tensor) -> None:
    if tensor.device != logps.device:
        raise TensorError(
            f"`{name}` must be on {logps.device} as `logps`, found it on {tensor.device}"
        )


def check_pair_of(name: str, logps: Tensor, ref_logps: Tensor, dims: int) -> None:
    """Log-probs of single completions (N,) or of lists (N, K), and their reference's."""
    shape = "(N,)" if dims == 1 else "(N, K)"
    if logps.dim() != dims or logps.dtype not in (torch.float32, torch.float64):
        raise TensorError(
            f"`{name}` must be float32 or float64 of shape {shape}, found {describe(logps)}"
        )
    if (
        ref_logps.shape != logps.shape
        or ref_logps.dtype != logps.dtype
        or ref_logps.device != logps.device
    ):
        raise TensorError(
            f"the reference's `{name}` must be {describe(logps)} on {logps.device}, found "
            f"{describe(ref_logps)} on {ref_logps.device}"
        )
    if ref_logps.requires_grad:
        raise TensorError(f"the reference's `{name}` asks for a gradient: detach it")


def check_is_number(total: Tensor, values: Tensor, logps: Tensor) -> None:
    """Refuse a total that is NaN: the first example whose loss is."""
    if host_values(total) and bool(total.isnan()):
        example = int(values.isnan().nonzero()[0])
        raise TensorError(f"example {example}: the loss is NaN for logps {logps[example].tolist()}")
