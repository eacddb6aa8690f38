"""`use_segment_attention`: transformers' models with attention segment by segment.

transformers asks an attention function for a name, and a mask function for the same name. Ours are
registered as ``"dpo_ext_segments"``. The mask function reads from transformers' own rule of who
sees whom where segments begin, so that what reaches the layers is a `SegmentMask` for each kind of
layer, of windows too; what is no such mask goes the way of ``"sdpa"``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, TypeVar
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn

from dpo_ext.errors import TensorError
from dpo_ext.layout.masks import check_bias
from dpo_ext.layout.segments import SEGMENTS, SegmentMask, Segments, seen
from dpo_ext.torch.agreement import as_it_was, plain_ids, text_config
from dpo_ext.torch.pieces import call_of
from dpo_ext.torch.segments import (
    as_autocast_has_them,
    choose,
    installed,
    segment_attention,
)

Model = TypeVar("Model", bound=nn.Module)
# Of how much of their spread hidden states may differ from those of the dense mask.
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Rules of so few entries are compared as a whole.
SMALL = 4096
# By how much of it hidden states move with the tokens of another segment: rounding, no more.
LEAK = {torch.float64: 1e-6, torch.float32: 1e-4}
EXACT = (torch.float64, torch.float32)
SEGMENTS_OF_ROW = 2
_CHECKED = "_dpo_ext_packed"
_BEFORE = "_dpo_ext_attention_before"


def use_segment_attention(model: Model) -> Model:
    """The model, whose packed and shared rows cost what their segments cost.

    Same as::

        model.set_attn_implementation("dpo_ext_segments")

    but for the part of the model that reads text alone, and compared: two segments of 8 tokens go
    through the model in one row with our attention, and each alone with its own. Then
    ``model(**batch.model_inputs)`` for packed and ``model(**batch.inputs_for(model))`` for shared
    batches build no mask of a row's square. Segments are found by ``position_ids`` that start
    again, so that batches of others serve as well, and so that models serve which do not tell
    transformers' masks their positions (gpt-oss, OPT). All other calls, generation among them, go
    through ``"sdpa"``.

    Served: grouped queries, sliding and chunked windows, a softcap (Gemma 2), sinks (gpt-oss),
    dropout, gradient checkpointing. Under ``torch.compile`` a packed row has transformers' dense
    mask.

    Args:
        model: a Hugging Face model with attention in every layer, or a PEFT or DDP wrapper of one.

    Returns:
        The same object. `segment_attention` is what its layers call.

    Raises:
        TensorError: the layers do not attend through transformers' ``AttentionInterface``, or give
            other hidden states; the model keeps the attention that it had.
        TypeError: no Hugging Face model.

    Numerics: hidden states as with the dense mask, up to the rounding of the dtype.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8,
    ...                      num_hidden_layers=1, num_attention_heads=2)
    >>> model = use_segment_attention(LlamaForCausalLM(config))
    >>> model.config._attn_implementation
    'dpo_ext_segments'
    """
    inner = unwrapped(model)
    reason = choose_segments(inner, always=True) or checked(inner)
    if reason is not None:
        raise TensorError(
            f"{type(inner).__name__} cannot attend segment by segment: {reason}\n"
            'hint: use layout="padded"'
        )
    return model


def unwrapped(model: Any) -> Any:
    """The Hugging Face model inside PEFT's and DDP's wrappers."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not hasattr(model, "config") or not hasattr(model, "base_model"):
        raise TypeError(f"`model` must be a Hugging Face model, found {type(model).__name__}")
    return model


def choose_segments(model: Any, *, always: bool = False) -> str | None:
    """Sets our attention, or says why not. What the user chose stays, unless ``always``: flash and
    flex attention, kernels of others, and ``eager`` where ``sdpa`` was to be had.
    """
    settable = getattr(model, "_can_set_attn_implementation", None)
    if settable is None or attention_of(model) is None or not settable():
        return "its attention does not go through transformers' AttentionInterface"
    current = attention_of(model)
    if current == SEGMENTS:
        register()
        return None
    if getattr(model.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    default = current == "sdpa" or (current == "eager" and not getattr(model, "_supports_sdpa", 1))
    if not default and not always:
        return f"its attention was chosen to be {current!r}"
    register()
    setattr(model, _BEFORE, current)
    _set(model, SEGMENTS)
    if attention_of(model) != SEGMENTS:
        return "its attention cannot be set"
    return None


def attention_of(model: Any) -> Any:
    """The name of the attention of the part that reads text."""
    return getattr(text_config(model.config), "_attn_implementation", None)


def step_back(model: Any) -> None:
    """Gives the model the attention back that it had."""
    _set(model, vars(model).get(_BEFORE, "sdpa"))


def _set(model: Any, name: str) -> None:
    config, text = model.config, text_config(model.config)
    parts = [key for key in getattr(config, "sub_configs", {}) if getattr(config, key) is text]
    model.set_attn_implementation({parts[0]: name} if parts and text is not config else name)


# ---- is it right ---------------------------------------------------------------------------------


def checked(model: Any) -> str | None:
    """Compares the hidden states of a packed row with those of its segments, each alone, by the
    model's own attention. Says how they differ, and then gives the model that attention back.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "meta":
        return None
    with _in_its_own_dtype(model, device):
        row = packed_row(model, device)
        before = _Count.segments
        try:
            ours = model.base_model(**row)[0]
        except Exception as error:
            said = str(error).partition("\n")[0][:200]
            reason: str | None = f"{type(error).__name__}: {said}"
        else:
            reason = None if _Count.segments > before else "its layers do not call it"
        step_back(model)
        if reason is None:
            alone = row["input_ids"].view(SEGMENTS_OF_ROW, -1)
            own = model.base_model(input_ids=alone, use_cache=False)[0].float()
            off = (ours.float().view_as(own) - own).square().mean(-1).sqrt()
            # Rounding sends a token to other experts now and then.
            worst = off.max() if ours.dtype in EXACT else off.median()
            far = float(worst / own.std().clamp_min(1e-12))
            if not far <= CLOSE.get(ours.dtype, 5e-2):
                reason = f"its hidden states are off by {far:.2g} of their spread"
        if reason is None:
            _set(model, SEGMENTS)
        return reason


@contextmanager
def _in_its_own_dtype(model: Any, device: torch.device) -> Iterator[None]:
    """As it was, and without autocast where the weights are of one dtype: what rounds little
    enough to tell a leak from a token that was sent to another expert.
    """
    plain = len({p.dtype for p in model.parameters() if p.is_floating_point()}) == 1
    exact: Any = torch.autocast(device.type, enabled=False) if plain else nullcontext()
    with torch.no_grad(), as_it_was(model, device), exact:
        yield


def leak(model: Any) -> float:
    """How far the hidden states of a segment move, of their spread, when another one changes."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "meta" or getattr(model.config, "is_encoder_decoder", False):
        return 0.0
    with _in_its_own_dtype(model, device):
        row = packed_row(model, device)
        first = model.base_model(**row)[0].float()
        ids = row["input_ids"].clone()
        half = ids.shape[1] // 2
        ids[:, :half] = ids[:, :half].flip(1)
        second = model.base_model(**{**row, "input_ids": ids})[0].float()
        moved = (first - second)[:, half:].abs().max()
        return float(moved / first.std().clamp_min(1e-12))


def check_packed(model: Any, call: Mapping[str, Any]) -> None:
    """Before the first packed or shared rows of a model: does its attention serve them?

    Raises:
        TensorError: segments see each other.
    """
    positions, mask = call.get("position_ids"), call.get("attention_mask")
    if vars(model).get(_CHECKED) or not isinstance(positions, Tensor) or positions.dim() != 2:
        return
    if (isinstance(mask, Tensor) and mask.dim() == 2) or not bool((positions[:, 1:] == 0).any()):
        return
    check_bias(model)
    name = type(model).__name__
    if attention_of(model) == SEGMENTS and _BEFORE in vars(model):
        reason = checked(model)
        if reason is not None:
            warnings.warn(
                f"{name} keeps its own attention, whose cost is the square of a packed row: with "
                f'ours {reason}\nhint: layout="padded"',
                UserWarning,
                stacklevel=2,
            )
    try:
        moved = leak(model)
    except Exception as error:
        said = str(error).partition("\n")[0][:200]
        raise TensorError(
            f"{name} reads no packed rows: {type(error).__name__}: {said}\n"
            'hint: use layout="padded"'
        ) from error
    if moved > LEAK.get(next(model.parameters()).dtype, 1e-2):
        raise TensorError(
            f"packed segments of {name} see each other: changing one moved hidden states of another"
            f' by {moved:.2g} of their spread\nhint: use layout="padded"'
        )
    setattr(model, _CHECKED, True)


def packed_row(model: Any, device: torch.device) -> dict[str, Any]:
    """Two segments of eight tokens."""
    ids = plain_ids(model, device)
    positions = torch.arange(ids.shape[1], device=device).repeat(ids.shape[0])
    return {"input_ids": ids.view(1, -1), "position_ids": positions[None], "use_cache": False}


# ---- what transformers calls ---------------------------------------------------------------------


class _Count:
    """How many layers attended segment by segment."""

    segments = 0


def restored() -> None:
    """Of a model that comes from another process."""
    if "transformers" in sys.modules:
        register()


@cache
def register() -> None:
    """Tells transformers both functions."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(SEGMENTS, attention_forward)
    AttentionMaskInterface.register(SEGMENTS, mask_of)


def mask_of(**kwargs: Any) -> Any:
    """The mask function: a `SegmentMask` where the rule is one, else what ``"sdpa"`` has."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    if not torch.compiler.is_compiling():
        try:
            found = _segment_mask(kwargs)
        except (RuntimeError, IndexError, TypeError, ValueError):  # a rule for single slots
            found = None
        if found is not None:
            return found
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**kwargs)


def _segment_mask(kwargs: dict[str, Any]) -> SegmentMask | None:
    """The rule of a call as segments and window, if it is that and nothing else."""
    slots = kwargs.get("cache_position")  # of transformers 4
    length = kwargs.get("q_length") if slots is None else len(slots)
    width, local = kwargs["kv_length"], kwargs.get("local_size")
    special = ("use_vmap", "attention_mask", "allow_is_bidirectional_skip", "q_offset", "kv_offset")
    if any(isinstance(kwargs.get(n), Tensor) or kwargs.get(n) for n in special) or not width:
        return None
    # As transformers has it: a window of just the row is one, and its mask is built.
    plain = kwargs.get("allow_is_causal_skip", True) and (local is None or local > width)
    if plain or length != width or (slots is not None and int(slots[0]) != 0):
        return None
    device = torch.device(kwargs.get("device", "cpu") if slots is None else slots.device)
    rows, rule = kwargs["batch_size"], kwargs["mask_function"]
    row, q = torch.arange(rows, device=device)[:, None], torch.arange(width, device=device)[None]

    def sees(query: Tensor, key: Tensor) -> Tensor:
        found: Tensor = rule(row, torch.zeros_like(row), query, key)
        return found.expand(rows, query.shape[1])

    # A segment begins where a slot does not see the one before it.
    begins = torch.ones(rows, width, dtype=torch.bool, device=device)
    begins[:, 1:] = ~sees(q[:, 1:], q[:, :-1])
    first = torch.where(begins, q, 0).cummax(1).values
    lowest, window = first, None
    if local is not None and not bool(sees(q, first).all()):
        lowest, window = torch.maximum(first, q - local + 1), local
    # The rule itself is asked whether that is all of it: at both ends, and here and there.
    right = sees(q, lowest) & sees(q, q)
    right &= ~sees(q, (lowest - 1).clamp(min=0)) | (lowest == 0)
    right[:, :-1] &= ~sees(q[:, :-1], q[:, 1:])
    shifts = range(width) if rows * width * width <= SMALL else (1, width // 2, width // 3 * 2)
    for shift in (*shifts, -1):
        key = (q * 2654435761 % width) if shift < 0 else (q + shift) % width
        right &= sees(q, key) == ((key >= lowest) & (key <= q))
    if not bool(right.all()):
        return None
    offsets = np.append(np.flatnonzero(begins.flatten().cpu().numpy()), rows * width)
    return SegmentMask.of(Segments((rows, width), offsets), window, device)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: `segment_attention` for a `SegmentMask`, else as ``"sdpa"``, or by
    its equation where that knows no softcap and no sinks.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    rows, width = query.shape[::2]
    own = attention_mask is None or (
        isinstance(attention_mask, SegmentMask) and len(attention_mask.segments.offsets) == rows + 1
    )
    if own and key.shape[2] == width > 1 and not torch.compiler.is_compiling():
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        told = _told(kwargs, rows, width) if causal else None
        if told is not None:
            window = None if attention_mask is None else attention_mask.window
            attention_mask = SegmentMask.of(told, window, query.device)
    if attention_mask is None and torch.compiler.is_compiling():
        check_compiled(module, kwargs)
    biased = any(kwargs.get(name) is not None for name in ("position_bias", "head_mask"))
    given: dict[str, Any] = {"dropout": dropout, "scaling": scaling}
    if isinstance(attention_mask, SegmentMask):
        fits = (rows, width, key.shape[2]) == (*attention_mask.shape[::2], width)
        if biased or not fits:
            attention_mask = attention_mask.dense()
        else:
            _Count.segments += 1
            options: dict[str, Any] = {
                "window": attention_mask.window,
                "scale": scaling,
                "softcap": softcap,
            }
            options |= {"sinks": s_aux, "dropout": dropout}
            segments = attention_mask.segments
            query, key, value = as_autocast_has_them(query, key, value)
            backend = choose(call_of(query, segments, **options), query, value)
            on_cuda = backend == "pieces" and query.device.type == "cuda"
            if on_cuda and not dropout and "flex" in installed():
                blocks = block_mask(attention_mask)
                flex = ALL_ATTENTION_FUNCTIONS["flex_attention"]
                more = {"softcap": softcap, "s_aux": s_aux}
                out: Tensor = flex(module, query, key, value, blocks, scaling=scaling, **more)[0]
                return out, None
            out = segment_attention(query, key, value, segments, **options, backend=backend)
            return out, None
    if softcap is None and s_aux is None:
        sdpa: Callable[..., tuple[Tensor, None]] = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, attention_mask, **given, **kwargs)
    return _explicit(module, query, key, value, attention_mask, softcap, s_aux, **given), None


def check_compiled(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Where segments begin is a value, which a compiled graph does not depend on."""
    if kwargs.get("cu_seq_lens_q") is not None:
        raise TensorError(
            f"{type(module).__name__} has no mask of packed rows, and cannot have one compiled\n"
            'hint: use layout="padded", or the model as it is'
        )


class _Told:
    """The segments that the latest tensor told, for all layers."""

    tensor: Any = None
    version = 0
    segments: Segments | None = None


def _told(kwargs: dict[str, Any], rows: int, width: int) -> Segments | None:
    """The segments that the arguments of a layer tell, if there is more than one in a row: a class
    may hand them on and still not tell the mask function.
    """
    told = kwargs.get("cu_seq_lens_q")
    if told is None:
        told = kwargs.get("position_ids")
    if not isinstance(told, Tensor) or told.dim() not in (1, 2):
        return None
    version = 0 if told.is_inference() else told._version  # noqa: SLF001
    if _Told.tensor is None or _Told.tensor() is not told or _Told.version != version:
        values = told.detach().cpu().numpy().astype(np.int64)
        if values.ndim == 1:
            fits = len(values) > rows + 1 and values[-1] == rows * width
            found = Segments((rows, width), values) if fits else None
        else:
            found = _by_positions(values, rows, width)
        _Told.tensor, _Told.version, _Told.segments = ref(told), version, found
    found = _Told.segments
    return found if found is not None and found.shape == (rows, width) else None


def _by_positions(positions: np.ndarray, rows: int, width: int) -> Segments | None:
    """A segment begins where positions do not go on, as in transformers."""
    if positions.shape[1] != width or positions.shape[0] not in (1, rows):
        return None
    begins = np.ones((rows, width), dtype=bool)
    begins[:, 1:] = np.diff(positions, axis=1) != 1
    if begins.sum() == rows:
        return None
    return Segments((rows, width), np.append(np.flatnonzero(begins), rows * width))


def _explicit(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """Attention with softcap or sinks under any mask, its scores materialised."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = (query @ key.mT).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    n, m = scores.shape[-2:]
    if mask is None and n > 1 and getattr(module, "is_causal", True):
        mask = torch.ones(n, m, dtype=torch.bool, device=scores.device).tril_()
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., :m].to(value.dtype)
    return (nn.functional.dropout(weights, dropout) @ value).transpose(1, 2).contiguous()


def block_mask(mask: SegmentMask) -> Any:
    """The same mask for FlexAttention, made once for all layers: of a shared batch by the blocks
    that Rust counted.
    """
    plans, name = mask.segments.plans, ("blocks", mask.window)
    if name not in plans or callable(plans[name]):
        made = plans.get(name)
        plans[name] = _block_mask(mask) if made is None else made()
    return plans[name]


def _block_mask(mask: SegmentMask) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    rows, width = mask.segments.shape
    arrays, window = mask.segments.on(mask.device), mask.window

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return seen(arrays, b * width + q, b * width + k, window)

    return create_block_mask(allowed, rows, None, width, width, device=mask.device.type)
