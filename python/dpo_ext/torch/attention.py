"""`assert_packing_safe`: does a model keep the segments of one row apart?"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpo_ext.errors import TensorError
from dpo_ext.layout.batch import LAYOUTS, Batch
from dpo_ext.layout.masks import check_bias, layer_windows
from dpo_ext.layout.plan import BatchPlan
from dpo_ext.layout.segments import SegmentMask
from dpo_ext.pairs import Pairs, Ragged
from dpo_ext.report import Report

PackedLayout = Literal["packed", "shared"]
PACKED: tuple[PackedLayout, ...] = get_args(PackedLayout)
_LENGTHS = ((5, 4, 6), (3, 1, 7))  # (prompt, chosen, rejected) of the two pairs
# Two runs of one shape differ by no rounding, so that any change is a leak.
_SAME = {torch.float64: 1e-6, torch.float32: 1e-5}
_SAME_LOW = 1e-3
# A row alone is another shape: rounding, relative to the spread of the logits.
_CLOSE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 1e-2}
_CLOSE_LOW = 5e-2
# What Hugging Face's gradient checkpointing reads of a module: whether, and by what.
_CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")
_HINTS = {
    "packed": "pass use_cache=False and no attention_mask, as `batch.model_inputs` does, to a "
    'model that reads `position_ids`; else use layout="padded"',
    "shared": "pass what `batch.inputs_for(model)` gives, use_cache=False among it; else use "
    'layout="padded"',
}


def assert_packing_safe(
    model: nn.Module,
    *,
    layout: PackedLayout = "packed",
    inputs: Callable[[Batch], dict[str, Any]] | None = None,
) -> None:
    """Refuses a model that lets packed segments see each other, or counts their positions wrongly.

    Two pairs in one row go through the model. Then other tokens stand in some segments, and the
    logits of the rest must not move; and they must be those of each sequence alone. That in eval
    and in train mode, in train mode also with gradient checkpointing, without gradients.

    Hugging Face models leak in silence if they are given a cache or a mask of ones, by 0.3 to 0.6
    in the logits, and they apply no sliding window to a mask that they are given: a shared batch
    needs ``batch.inputs_for(model)`` then.

    Args:
        model: anything called with the arguments of ``inputs`` that returns logits (R, T, V), or an
            object with ``.logits`` or ``.last_hidden_state``.
        layout: ``"packed"`` or ``"shared"``.
        inputs: from a batch on the model's device to the model's keyword arguments, as the training
            loop makes them; ``lambda batch: batch.model_inputs`` by default.

    Raises:
        TensorError: segments leak, or positions are wrong; the message says in which mode. Or the
            model has ALiBi, which goes wrong in long rows alone.
        ValueError: an unknown ``layout``.

    Numerics: a leak is a change of more than 1e-5 of the logits' spread (16 bits: 1e-3) between two
    runs of one shape and seed; a wrong position one of 1e-3 (float16 1e-2, bfloat16 5e-2) against
    the sequence alone, looked at where the model has no dropout. The modes of all modules, their
    checkpointing and the random state are as before, whatever happens.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8,
    ...                      num_hidden_layers=1, num_attention_heads=2)
    >>> model = LlamaForCausalLM(config)
    >>> assert_packing_safe(model)
    >>> leaks = lambda batch: {**batch.model_inputs, "use_cache": True}
    >>> assert_packing_safe(model, inputs=leaks)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    dpo_ext.errors.TensorError: packed segments see each other in eval mode: ...
    """
    if layout not in PACKED:
        known = ", ".join(f'"{name}"' for name in PACKED)
        raise ValueError(f"unknown `layout` {layout!r}: there is {known}")
    check_bias(model)
    make = inputs or (lambda batch: batch.model_inputs)
    probe = _Probe(model, layout, make)
    if LAYOUTS[layout].masked:
        probe.check_windows()
    with _state_kept(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # checkpointing says that no input needs a gradient
        for train, checkpointing in ((False, False), (True, False), (True, True)):
            if checkpointing and not _checkpointed(model):
                continue
            model.train(train)
            _set_checkpointing(model, checkpointing)
            mode = "train" if train else "eval"
            probe.run(f"{mode} mode" + " with gradient checkpointing" * checkpointing)


class _Probe:
    """Two pairs, and how far the logits of their completions move."""

    def __init__(self, model: nn.Module, layout: PackedLayout, make: Callable) -> None:
        self._model, self._layout, self._make = model, layout, make
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        vocabulary = _vocabulary(model)
        random = np.random.default_rng(0)
        self._ids = [[random.integers(0, vocabulary, n) for n in ns] for ns in _LENGTHS]
        # Another token everywhere.
        self._others = [
            [(ids + random.integers(1, vocabulary, len(ids))) % vocabulary for ids in pair]
            for pair in self._ids
        ]

    def run(self, where: str) -> None:
        """Compares in the mode that the model is in."""
        base = self._logits(self._batch(self._ids))
        dtype, spread = base[0].dtype, torch.cat(base).float().std().clamp_min(1e-12)

        def off(found: list[Tensor], want: list[Tensor], sequences: tuple[int, ...]) -> float:
            errors = [(found[s].float() - want[s].float()).square().mean() for s in sequences]
            worst = torch.stack(errors).sqrt().max() / spread
            return float("inf") if worst.isnan() else worst.item()

        first_changed = [self._others[0], self._ids[1]]
        chosen_changed = [
            [prompt, others[1], rejected]
            for (prompt, _, rejected), others in zip(self._ids, self._others, strict=True)
        ]
        for pairs, unchanged in ((first_changed, (2, 3)), (chosen_changed, (1, 3))):
            moved = off(self._logits(self._batch(pairs)), base, unchanged)
            if moved > _SAME.get(dtype, _SAME_LOW):
                raise TensorError(
                    f"{self._layout} segments see each other in {where}: changing one moved the "
                    f"logits of another by {moved:.2g} of their spread\n"
                    f"hint: {_HINTS[self._layout]}"
                )
        again = self._logits(self._batch(self._ids), seed=1)
        if off(again, base, (0, 1, 2, 3)) > _SAME.get(dtype, _SAME_LOW):
            return  # dropout: rows of another shape draw other numbers
        moved = off(self._alone(), base, (0, 1, 2, 3))
        if moved > _CLOSE.get(dtype, _CLOSE_LOW):
            raise TensorError(
                f"{self._layout} logits are not those of each sequence alone in {where}: they are "
                f"off by {moved:.2g} of their spread, so that positions or masks are not used\n"
                f"hint: {_HINTS[self._layout]}"
            )

    def check_windows(self) -> None:
        """Whether a shared batch's mask has the windows of the model's layers, however long."""
        if not hasattr(self._model, "config"):
            return
        batch = self._batch(self._ids)
        for kind, window in layer_windows(self._model).items():
            if window is None:
                continue
            # Positions so far apart that a window holds one of them.
            apart = replace(batch, position_ids=batch.position_ids * window)
            mask: Any = self._make(apart).get("attention_mask")
            mask = mask.get(kind) if isinstance(mask, dict) else mask
            if isinstance(mask, SegmentMask):
                if mask.window == window:  # it counts in slots of a sequence
                    continue
                mask = mask.dense()
            slots = torch.arange(apart.input_ids.shape[1], device=self._device)
            zero = torch.zeros_like(slots[:1])
            if isinstance(mask, Tensor):
                seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
            elif hasattr(mask, "mask_mod"):
                seen = mask.mask_mod(zero, zero, slots[:, None], slots)[None]
            else:
                seen = slots[None, :, None] >= slots
            position = apart.position_ids
            if bool((seen & (position[:, :, None] - position[:, None, :] >= window)).any()):
                raise TensorError(
                    f"the mask of a shared batch ignores the model's sliding window of {window}\n"
                    f"hint: {_HINTS['shared']}"
                )

    def _batch(self, pairs: list[list[np.ndarray]]) -> Batch:
        ids = (Ragged.from_lists(lists) for lists in zip(*pairs, strict=True))
        probe = Pairs(*ids, report=Report(len(pairs), len(pairs)), pad_id=0, vocab_size=None)
        plan = BatchPlan(probe, layout=self._layout, pairs_per_batch=len(pairs), shuffle=False)
        return plan[0].to(self._device)

    def _call(self, arguments: dict[str, Any], seed: int) -> Tensor:
        torch.manual_seed(seed)  # the same dropout in runs of one shape
        out = self._model(**arguments)
        for name in ("logits", "last_hidden_state"):
            out = getattr(out, name, out)
        out = out if isinstance(out, Tensor) else out[0]
        return out.reshape(-1, out.shape[-1])

    def _logits(self, batch: Batch, seed: int = 0) -> list[Tensor]:
        """The scored rows of each of the four sequences."""
        rows = self._call(self._make(batch), seed)[batch.logit_rows]
        return [rows[a:b] for a, b in itertools.pairwise(batch.seq_offsets.tolist())]

    def _alone(self) -> list[Tensor]:
        found = []
        for prompt, *sides in self._ids:
            for side in sides:
                ids = torch.from_numpy(np.concatenate([prompt, side]))[None].to(self._device)
                arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                logits = self._call({**arguments, "use_cache": False}, 0)
                found.append(logits[len(prompt) - 1 : -1])
        return found


def _vocabulary(model: nn.Module) -> int:
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    config = getattr(model, "config", None)
    # Ids below the smallest table are in range of every one.
    size = getattr(config, "vocab_size", None) or min(sizes, default=0)
    if size < 2:
        raise TensorError("the model shows no vocabulary: no `config.vocab_size`, no embedding")
    return int(size)


def _checkpointed(model: nn.Module) -> list[nn.Module]:
    """The modules that Hugging Face's gradient checkpointing works on."""
    return [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]


def _set_checkpointing(model: nn.Module, on: bool) -> None:
    # Not `gradient_checkpointing_enable`, which adds hooks to a model with adapters.
    attributes = zip(_CHECKPOINTING, (on, partial(checkpoint, use_reentrant=False)), strict=True)
    for name, value in attributes:
        for module in _checkpointed(model):
            setattr(module, name, value)


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """Restores modes, checkpointing and random state."""
    modes = [(module, module.training) for module in model.modules()]
    before = [
        (m, {n: vars(m)[n] for n in _CHECKPOINTING if n in vars(m)}) for m in _checkpointed(model)
    ]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[device.index for device in devices]):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for module, values in before:
                for name in _CHECKPOINTING:
                    vars(module).pop(name, None)
                vars(module).update(values)
