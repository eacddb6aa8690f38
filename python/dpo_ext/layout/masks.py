"""What a model needs to read a shared batch: dense masks, FlexAttention's block masks, windows.

Letters: R rows, T slots of a row.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from dpo_ext.errors import TensorError
from dpo_ext.layout import BLOCK
from dpo_ext.layout.segments import SEGMENTS, SegmentMask, Segments

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class SharedRows(Protocol):
    """What a mask is made of: a batch of ``layout="shared"``."""

    @property
    def layout(self) -> str: ...
    @property
    def position_ids(self) -> Any: ...
    @property
    def doc(self) -> Any: ...
    @property
    def seg(self) -> Any: ...


class SharedBlocks(SharedRows, Protocol):
    """The same, with the blocks of FlexAttention counted."""

    @property
    def blocks(self) -> dict[str, Any]: ...
    @property
    def segments(self) -> Segments: ...


# Marks a mask that knows no windows: nothing in its numbers tells.
_PLAIN = "_dpo_ext_plain"


def dense_mask(
    batch: SharedRows, *, window: int | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The mask of a shared batch, slot against slot, on the batch's device.

    Same as::

        allowed[r, 0, q, k] = (
            q >= k and doc[r, q] == doc[r, k] and (seg[r, k] == 0 or seg[r, k] == seg[r, q])
            and position_ids[r, q] - position_ids[r, k] < window
        )

    Args:
        batch: of ``layout="shared"``.
        window: positions that a query sees, its own included; None for all before it.
        dtype: None for True where attended; a floating dtype for what is added to the scores, 0
            where attended and the least finite number elsewhere.

    Returns:
        (R, 1, T, T). Every slot sees itself, in the tail too, so that no row is empty.

    Raises:
        TensorError: another layout.

    >>> from dpo_ext import PairDataset
    >>> pairs = PairDataset.from_ids([[1, 2]], [[3, 4]], [[5]])
    >>> batch = pairs.plan(layout="shared", pairs_per_batch=1)[0]
    >>> dense_mask(batch)[0, 0].int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 0],
            [1, 0, 0, 1]], dtype=torch.int32)
    """
    doc, seg, positions = _ids(batch)
    slot = torch.arange(doc.shape[1], device=doc.device)
    allowed = slot[:, None] >= slot
    allowed = allowed & (doc[:, :, None] == doc[:, None, :])
    allowed &= (seg[:, None, :] == 0) | (seg[:, None, :] == seg[:, :, None])
    if window is not None:
        allowed &= positions[:, :, None] - positions[:, None, :] < window
    allowed = allowed[:, None]
    if dtype is None:
        return allowed
    # Not -inf: the difference of two of them is NaN in some kernels.
    added = torch.zeros(allowed.shape, dtype=dtype, device=doc.device)
    return added.masked_fill_(~allowed, torch.finfo(dtype).min)


def block_mask(batch: SharedBlocks, *, window: int | None = None) -> BlockMask:
    """The mask of a shared batch for ``torch.nn.attention.flex_attention``.

    Same as ``create_block_mask`` of the rule of :func:`dense_mask`, but nothing is evaluated on the
    device: Rust counted the blocks of 128 x 128 when it built the batch. With a ``window``
    ``create_block_mask`` runs on the batch's device.

    Raises:
        TensorError: another layout.  ValueError: the rows have no slot.
    """
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

    doc, seg, positions = _ids(batch)
    rows, width = doc.shape
    if width == 0:
        raise ValueError("a block mask needs at least one slot in a row")

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = (q >= k) & (doc[b, q] == doc[b, k])
        same = same & ((seg[b, k] == 0) | (seg[b, k] == seg[b, q]))
        return same if window is None else same & (positions[b, q] - positions[b, k] < window)

    if window is not None:
        return create_block_mask(
            allowed, B=rows, H=None, Q_LEN=width, KV_LEN=width, device=doc.device.type
        )
    blocks: dict[str, Any] = {n: torch.as_tensor(value) for n, value in batch.blocks.items()}
    return BlockMask(
        seq_lengths=(width, width), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=allowed, **blocks
    )


def plain_mask(batch: SharedRows) -> Tensor:
    """The mask of ``Batch.model_inputs``, which `check_windows` knows again."""
    mask = dense_mask(batch, dtype=torch.float32)
    setattr(mask, _PLAIN, True)
    return mask


def check_windows(mask: Any, model: Any) -> None:
    """Refuses the mask of ``Batch.model_inputs`` for a model whose windows are shorter than it.

    Raises:
        TensorError: the model has sliding windows, and the mask, which replaces them, has none.
    """
    if not getattr(mask, _PLAIN, False):
        return
    for window in layer_windows(model).values():
        if window is not None and mask.shape[-1] > window:
            raise TensorError(
                f"the mask of a shared batch ignores the model's sliding window of {window}\n"
                "hint: use batch.inputs_for(model) instead of batch.model_inputs"
            )


def check_bias(model: Any) -> None:
    """Refuses a model whose attention counts from the start of a row, for rows of several segments.

    Raises:
        TensorError: it has ALiBi, whose bias of 16 bits grows along the row: far into one it no
            longer tells neighbours apart, of which a trial on a short row sees nothing.
    """
    config: Any = getattr(getattr(model, "module", model), "config", None)  # DDP hides it
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    if getattr(config, "alibi", False):
        raise TensorError(
            f"{type(model).__name__} has ALiBi, whose bias counts and rounds along the whole row\n"
            'hint: use layout="padded"'
        )


def mask_for(batch: SharedBlocks, model: Any) -> Any:
    """The mask of ``Batch.inputs_for``: one, or one for each kind of layer."""
    config = _config(model)
    implementation = getattr(config, "_attn_implementation", None)

    def mask(window: int | None) -> Any:
        if implementation == "flex_attention":
            return block_mask(batch, window=window)
        # Eager attention adds its mask to the scores: a bool one would add 1.
        dtype = model.dtype if implementation == "eager" else None
        return dense_mask(batch, window=window, dtype=dtype)

    if implementation == SEGMENTS:
        # Its own: what a mask keeps there knows the batch, which must not keep itself alive.
        known = batch.segments
        segments = Segments(known.shape, known.offsets, known.prefixes)
        device = torch.as_tensor(batch.position_ids).device

        def mask(window: int | None) -> Any:
            segments.plans["blocks", window] = partial(block_mask, batch, window=window)
            return SegmentMask.of(segments, window, device)

    elif implementation not in ("eager", "sdpa", "flex_attention"):
        raise TensorError(
            f"the model's attention is {implementation!r}, which takes no mask of its own\n"
            'hint: load it with attn_implementation="sdpa" or "flex_attention", or use '
            'layout="packed"'
        )
    windows = layer_windows(model)
    masks = {kind: mask(window) for kind, window in windows.items()}
    return next(iter(masks.values())) if len(masks) == 1 else masks


def layer_windows(model: Any) -> dict[str, int | None]:
    """The kinds of attention layers of a Hugging Face model and the window of each.

    Raises:
        TensorError: a kind of layer that no mask describes, such as a recurrent or a chunked one.
    """
    config = _config(model)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return {"full_attention" if window is None else "sliding_attention": window}
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise TensorError(
            f"the model has layers of the kind {unknown[0]!r}, which a mask does not describe\n"
            'hint: use layout="packed" or "padded"'
        )
    windows = {"full_attention": None, "sliding_attention": window}
    return {kind: windows[kind] for kind in sorted(set(kinds))}


def _config(model: Any) -> Any:
    config = getattr(getattr(model, "module", model), "config", None)  # DDP hides it
    if config is None:
        raise TypeError(f"`model` must be a Hugging Face model, found {type(model).__name__}")
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _ids(batch: SharedRows) -> tuple[Tensor, Tensor, Tensor]:
    if batch.layout != "shared":
        raise TensorError(f'only layout="shared" has such a mask, found "{batch.layout}"')
    doc, seg, positions = (
        torch.as_tensor(getattr(batch, name)) for name in ("doc", "seg", "position_ids")
    )
    return doc, seg, positions
