"""Whether what scoring computes from a model's hidden states are that model's own logits.

Scoring needs ``transform(W h)``, and knows W and the transform from names: names of modules and of
fields of a configuration. What a class really does between its backbone and its logits only its
forward knows. So both ways are run once on a short row, and compared.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Logits = dict[str, float | None]
NEUTRAL: Logits = {"logit_scale": 1.0, "softcap": None}

# Logits of the comparison are as large as those of a trained model, where a cap shows.
LOUD = 40.0
ROWS, COLUMNS = 2, 8
# Rounding steps of the largest logit by which the two may differ: the products are the same, what
# comes behind them may be computed in float32 here and in the model's dtype there.
STEPS = {torch.float64: 64, torch.float32: 64, torch.bfloat16: 2, torch.float16: 2}

# Drifts that are found: so many standard errors, and at least a slope of 0.2 %, a bend of 0.3 % or
# offsets of 0.06 nats, below which the model itself may round a scale or a bias to bfloat16.
SIGMAS, SLOPE, BEND, OFFSETS = 6.0, 2e-3, 3e-3, 0.06


class Verdict(NamedTuple):
    """What a comparison found.

    - ``transform``: scale and cap with which the head's product is the model's logits; None if
      there are none.
    - ``reason``: why there are none, in words.
    - ``keeps``: whether the model's forward takes ``logits_to_keep`` with indices of positions.
    - ``caches``: whether its logits are others with ``use_cache=False`` than without the word.
    - ``error``, ``budget``: largest difference of a log-prob, and what was allowed, in nats.
    """

    transform: Logits | None
    reason: str = ""
    keeps: bool = False
    caches: bool = False
    error: float = math.nan
    budget: float = math.nan


class Product(Protocol):
    """A head as far as it is compared: the module that the model calls, and a product."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def weight(self) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor:
        """What the module gives for hidden states, if the head is linear."""


def examine(
    model: Any,
    own: Callable[..., Any],
    head: Product | str,
    transforms: Sequence[Logits],
    device: torch.device,
    *,
    keeps: bool = False,
) -> Verdict:
    """Compares the logits of ``own``, the model's own forward, with those of each transform.

    Two forwards of a row of 8 tokens, in evaluation mode, without gradient; random states and
    modes are as before. ``head`` may be the reason why there is no linear one: then only
    ``keeps`` is found out, which else costs two forwards more, and is left open unless asked for.
    """
    with torch.no_grad(), as_it_was(model, device):
        inputs = _probe(model, device)
        try:
            if isinstance(head, str):
                found = Verdict(None, head)
            else:
                found = _compare(model, own, head, transforms, inputs)
            if found.transform is None or keeps:
                return _by_itself(own, inputs, found)
            return found
        except Exception as error:
            said = str(error).partition("\n")[0][:200]
            return Verdict(None, f"the comparison failed: {type(error).__name__}: {said}")


def _compare(
    model: Any,
    own: Callable[..., Any],
    head: Product,
    transforms: Sequence[Logits],
    inputs: dict[str, Tensor],
) -> Verdict:
    hidden = model.base_model(**inputs, use_cache=False)[0].to(head.weight.device)
    quiet = head.logits(hidden)
    loudest = float(quiet.abs().max())
    # A power of two changes no digit of the hidden states.
    factor = 2.0 ** math.floor(math.log2(LOUD / loudest)) if 0 < loudest < LOUD else 1.0
    with _amplified(model.base_model, head.module, factor) as seen:
        theirs = own(**inputs).logits
    if seen:
        seen[0] = seen[0].to(hidden.device)
        size = float(hidden.abs().max())
        same = seen[0].shape == hidden.shape
        if not same or not float((seen[0] - hidden).abs().max()) <= _steps(hidden.dtype) * size:
            return Verdict(None, "its forward gives the head other hidden states than `base_model`")
        drift = Drift.of(seen[0].double(), hidden.double())
        if drift.scales():
            return Verdict(
                None, f"its forward gives the head {1 + drift.slope:.4f} of the hidden states"
            )
        hidden = seen[0] * factor  # of two passes the same one, whose rounding is not compared
    ours = head.logits(hidden)
    if theirs.shape != ours.shape:
        columns = f"{theirs.shape[-1]} columns for {ours.shape[-1]} rows of the head"
        shapes = f"of shape {tuple(theirs.shape)} for {tuple(ours.shape)}"
        same = theirs.shape[:-1] == ours.shape[:-1]
        return Verdict(None, f"its logits have {columns}" if same else f"its logits are {shapes}")
    want = theirs.double().log_softmax(-1)
    eps = max(_steps(t.dtype) for t in (hidden, ours, theirs))
    budget = eps * max(1.0, float(theirs.abs().max()))
    found = []
    looks = ""
    for transform in transforms:
        made = _transformed(ours.double(), transform)
        error = float((made.log_softmax(-1) - want).abs().max())
        found.append(error)
        if error > budget:
            continue
        drift = Drift.of(theirs.double(), made)
        looks = drift.looks_like()
        if not looks:
            return Verdict(transform, error=error, budget=budget)
    error = min(found)
    if looks:  # what rounding may do, but not all in one direction
        return Verdict(
            None, f"log-probs from its head differ by {looks}", error=error, budget=budget
        )
    looks = _looks_like(head.module, theirs.double(), ours.double())
    reason = f"log-probs from its head are off by {error:.2g} nats (allowed: {budget:.1g}): {looks}"
    return Verdict(None, reason, error=error, budget=budget)


class Drift(NamedTuple):
    """The part of a difference that rounding does not explain: it has a direction.

    Rounding errors of half width are as large as a scale that is off by 1 %, but each has a sign of
    its own, and over all tokens and columns they average out. Each part is least squares of
    ``theirs - ours`` less the mean of its row, which no log-prob sees; its standard error is that
    for errors of any size in any place. Letters: M rows, V columns.

    - ``slope``: of theirs on ours, less 1.
    - ``bend``: what a cube of ours explains of the rest, as a part of the largest: a cap.
    - ``offsets``: root mean square of what single columns have more or less in all rows, less what
      M rows of rounding give; ``offsets_error`` is the root of the standard error of its square.
    """

    slope: float
    slope_error: float
    bend: float = 0.0
    bend_error: float = 0.0
    offsets: float = 0.0
    offsets_error: float = 0.0

    @staticmethod
    def of(theirs: Tensor, ours: Tensor) -> Drift:
        """Of values (..., V) in float64."""
        V = theirs.shape[-1]
        raw, d = ours.reshape(-1, V), _centred((theirs - ours).reshape(-1, V))
        M, y, largest = raw.shape[0], _centred(raw), float(raw.abs().amax())
        slope, slope_error, _ = _fit(d, y)
        if not largest:
            return Drift(slope, slope_error)
        cube = _centred((raw / largest) ** 3)
        bend, bend_error, rest = _fit(_fit(d, y)[2], _fit(cube, y)[2])
        columns = rest.mean(0)
        noise = (rest - columns).square().sum(0) / (M * max(M - 1, 1))
        square = float((columns.square() - noise).mean())
        offsets_error = float(noise.square().sum()) ** 0.5 * 2**0.5 / V
        offsets = max(square, 0.0) ** 0.5
        bent = (bend / largest, bend_error / largest)
        return Drift(slope, slope_error, *bent, offsets, offsets_error**0.5)

    def scales(self) -> bool:
        return abs(self.slope) > SLOPE and abs(self.slope) > SIGMAS * self.slope_error

    def bends(self) -> bool:
        return abs(self.bend) > BEND and abs(self.bend) > SIGMAS * self.bend_error

    def shifts(self) -> bool:
        return self.offsets > OFFSETS and self.offsets**2 > SIGMAS * self.offsets_error**2

    def looks_like(self) -> str:
        """What it is, or "" where it may be rounding."""
        if self.bends():
            return f"a cap under another name, {abs(self.bend):.2%} of the largest logit"
        if self.scales():
            return f"a scale of {1 + self.slope:.4f}, or a cap near it, under another name"
        if self.shifts():
            return f"offsets of single columns, of {self.offsets:.2g} nats"
        return ""


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def _fit(d: Tensor, x: Tensor) -> tuple[float, float, Tensor]:
    """Slope of ``d`` on ``x``, its standard error, and what is left of ``d``."""
    size = float((x * x).sum())
    if not size:
        return 0.0, 0.0, d
    slope = float((d * x).sum()) / size
    rest = d - slope * x
    return slope, float(((rest * x) ** 2).sum()) ** 0.5 / size, rest


def _steps(dtype: torch.dtype) -> float:
    return STEPS.get(dtype, 64) * torch.finfo(dtype).eps


def _transformed(logits: Tensor, transform: Logits) -> Tensor:
    logits = logits * (transform["logit_scale"] or 1.0)
    cap = transform["softcap"]
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _looks_like(head: nn.Module, theirs: Tensor, ours: Tensor) -> str:
    """What a difference looks like."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    if any(getattr(head, name, None) for name in hooks):
        return "a hook on the head"
    if "forward" in vars(head) or type(head).forward is not nn.Linear.forward:
        return f"the head has a forward of its own ({type(head).__name__})"
    ratio = float((theirs * ours).sum() / (ours * ours).sum())
    if float((theirs - ratio * ours).abs().max()) < 1e-3 * float(theirs.abs().max()):
        return f"a scale of {ratio:.4g} under another name"
    if float(theirs.abs().max()) < 0.9 * float(ours.abs().max()) and bool(
        (theirs.sign() == ours.sign()).double().mean() > 0.99
    ):
        return "a cap or a scale under another name"
    return "something between the hidden states and the logits"


def _by_itself(own: Callable[..., Any], inputs: dict[str, Tensor], found: Verdict) -> Verdict:
    """The same with what the model's own forward can do."""
    logits = own(**inputs).logits
    uncached = own(**inputs, use_cache=False).logits
    caches = not torch.allclose(logits.float(), uncached.float(), rtol=1e-2, atol=1e-4)
    keeps = False
    if logits.dim() == 3 and logits.shape[1] == COLUMNS:
        some = torch.tensor([1, 3, 4], device=logits.device)
        try:
            kept = own(**inputs, logits_to_keep=some).logits
        except Exception:  # of a class that knows no such word, or knows it otherwise
            kept = logits[:, :0]
        want = logits[:, some]
        keeps = kept.shape == want.shape and torch.allclose(
            kept.float(), want.float(), rtol=1e-2, atol=1e-4
        )
    return found._replace(keeps=keeps, caches=caches)


@contextmanager
def _amplified(backbone: nn.Module, head: nn.Module, factor: float) -> Iterator[list[Tensor]]:
    """Multiplies what the backbone gives, or what the head is given if nobody calls the backbone,
    and collects what it was.
    """
    seen: list[Tensor] = []

    def louder(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            seen.append(output)
            return output * factor
        if isinstance(output, tuple):
            seen.append(output[0])
            return (output[0] * factor, *output[1:])
        name = next(iter(output.keys()))
        seen.append(output[name])
        changed = copy.copy(output)
        changed[name] = output[name] * factor
        return changed

    def given(module: nn.Module, args: tuple[Any, ...]) -> Any:
        if seen or not args:
            return None
        seen.append(args[0])
        return (args[0] * factor, *args[1:])

    handles = [
        backbone.register_forward_hook(louder),
        head.register_forward_pre_hook(given, prepend=True),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode inside; modes and random states come back."""
    training = [module for module in model.modules() if module.training]
    state = torch.random.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
        torch.random.set_rng_state(state)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)


def _probe(model: Any, device: torch.device) -> dict[str, Tensor]:
    rows = plain_ids(model, device)
    inputs = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = rows
    return inputs


def plain_ids(model: Any, device: torch.device) -> Tensor:
    """Token ids that mean nothing special to the model, (2, 8)."""
    text = text_config(model.config)
    V = int(getattr(text, "vocab_size", 0) or model.get_input_embeddings().weight.shape[0])
    special = set(_special_ids(model.config.to_dict()))
    plain = (i * 2654435761 % V for i in range(1, 64 * ROWS * COLUMNS))
    ids = [i for i in plain if i not in special][: ROWS * COLUMNS]
    ids += [0] * (ROWS * COLUMNS - len(ids))
    return torch.tensor(ids, device=device).view(ROWS, COLUMNS)


def text_config(config: Any) -> Any:
    """The configuration of the part of a model that reads text."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _special_ids(config: Mapping[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _special_ids({str(key): item for key, item in value.items()})
        elif name.endswith(("token_id", "token_index", "token_ids")):
            yield from (i for i in ([value] if isinstance(value, int) else value or ()))
