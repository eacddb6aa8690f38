"""What an adapter adds to a head: a product through a few columns, and a factor of each logit.

Letters: R rows of hidden states, H hidden, V vocabulary, C rows of a chunk, K columns between, the
rank of the adapter or the sum of several.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_ext.errors import TensorError, describe
from dpo_ext.torch.logps.products import HALVES, add_product, by_tiles, part, product, tiles, wide
from dpo_ext.torch.logps.scores import is_dtensor

NOTHING: tuple[None, None, None] = (None, None, None)
"""The tensors of no adapter."""


class LowRank(NamedTuple):
    """The adapter of a head: its logits are ``columns * (x W^T) + (x down^T) up^T + bias``.

    LoRA (Hu et al. 2021, arXiv:2106.09685) with its scaling s is ``LowRank(s * A, B)``. DoRA (Liu
    et al. 2024, arXiv:2402.09353) has ``c = m / ||W + s B A||``, a number a row of the weight, and
    is ``LowRank(s * A, c[:, None] * B, c)``. Several adapters stand side by side in K.

    - ``down``: (K, H) and ``up``: (V, K), floating-point, each product made in the dtype of its own
      matrix: that of the head, or float32 beside a head in half width.
    - ``columns``: (V,) or None for 1.
    """

    down: Tensor
    up: Tensor
    columns: Tensor | None = None

    @staticmethod
    def of(down: Tensor | None, up: Tensor | None, columns: Tensor | None) -> LowRank | None:
        """The adapter of these tensors, or None for those of `NOTHING`."""
        return None if down is None or up is None else LowRank(down, up, columns)

    def check(self, hidden: Tensor, weight: Tensor) -> None:
        """TensorError for tensors that do not fit a head."""
        (V, H), K = (
            weight.shape,
            len(self.down) if isinstance(self.down, Tensor) and self.down.dim() else 0,
        )
        shapes = {"down": (K, H), "up": (V, K), "columns": (V,)}
        for name, value in self._asdict().items():
            if value is None and name == "columns":
                continue
            if not isinstance(value, Tensor):
                raise TypeError(f"`adapter.{name}` must be a torch.Tensor, found {describe(value)}")
            if is_dtensor(value):
                raise TensorError(f"`adapter.{name}` must be a plain tensor, found a DTensor")
            if tuple(value.shape) != shapes[name] or not value.is_floating_point():
                raise TensorError(
                    f"`adapter.{name}` must be floating-point of shape {shapes[name]}, found "
                    f"{describe(value)}"
                )
            if value.device != hidden.device:
                found = value.device
                raise TensorError(f"`adapter.{name}` must be on {hidden.device}, found {found}")

    def trains(self) -> bool:
        """Whether anything here gets a gradient."""
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in self)

    def between(self, x: Tensor) -> Tensor:
        """(C, K), ``x down^T``, in the dtype of ``up``."""
        return (x.to(self.down.dtype) @ self.down.t()).to(self.up.dtype)

    def add_to(self, z: Tensor, x: Tensor, bias: Tensor | None) -> None:
        """Makes the adapted logits of ``z = x W^T``, which has its bias where there are no columns;
        they are rounded once.
        """
        u, up, columns = self.between(x), self.up, self.columns
        if z.dtype == up.dtype and not by_tiles(z) and (columns is None or z.dtype not in HALVES):
            if columns is not None:
                z.mul_(columns)
            z.addmm_(u, up.t())
            if columns is not None and bias is not None:
                z.add_(bias)
            return
        sums = wide(z.dtype)
        u = u.to(sums)
        for tile in tiles(z.shape[1]):
            some = z[:, tile].to(sums)
            if columns is not None:
                some = some * part(columns, tile).to(sums)
            some = torch.addmm(some, u, part(up, tile).to(sums).t())
            if columns is not None and bias is not None:
                some = some + part(bias, tile)
            z[:, tile] = some

    def exact(self, y: Tensor, x: Tensor, bias: Tensor | None, column: Tensor) -> Tensor:
        """(C,) adapted logits of one column each, of ``y`` its product with the weight."""
        if self.columns is not None:
            y = y * self.columns[column].to(y.dtype)
        y = y + (self.between(x).to(y.dtype) * self.up[column].to(y.dtype)).sum(1)
        return y if self.columns is None or bias is None else y + bias[column]

    def back(self, dz: Tensor) -> Tensor:
        """(C, K), ``dz up``: the gradient of what is between, added in float32."""
        if dz.dtype == self.up.dtype:
            return product(dz, self.up)
        sums = wide(dz.dtype)
        total = torch.zeros(dz.shape[0], self.up.shape[1], dtype=sums, device=dz.device)
        for tile in tiles(dz.shape[1]):
            total.addmm_(dz[:, tile].to(sums), part(self.up, tile).to(sums))
        return total

    def through(self, du: Tensor) -> Tensor:
        """(C, H), ``du down``: what the hidden states get."""
        sums = wide(du.dtype)
        return du.to(sums) @ self.down.to(sums)

    def headroom(self) -> Tensor | None:
        """A power of 2, at least 1 and the largest column, by which gradients of logits may grow on
        their way; None where they do not.
        """
        if self.columns is None:
            return None
        largest = self.columns.detach().abs().float()
        largest = torch.cat([largest, largest.new_ones(1)]).amax().clamp(max=2.0**60)
        mantissa, exponent = torch.frexp(largest)
        return torch.ldexp(torch.ones_like(largest), exponent - (mantissa == 0.5).int())


class LowRankSums:
    """The gradients of a `LowRank`, added over chunks in float32."""

    def __init__(self, low: LowRank, needed: tuple[bool, ...], dtype: torch.dtype) -> None:
        self.low = low
        make = [
            torch.zeros(t.shape, dtype=wide(dtype), device=t.device)
            if need and t is not None
            else None
            for t, need in zip(low, needed, strict=True)
        ]
        self.down, self.up, self.columns = make

    def add(self, dz: Tensor, du: Tensor, x: Tensor, base: Tensor | None) -> None:
        """The part of a chunk: ``base`` (C, V) is its product with the weight."""
        if self.down is not None:
            add_product(self.down, du.to(self.down.dtype), x, first=False)
        if self.up is not None:
            add_product(self.up, dz, self.low.between(x), first=False)
        if self.columns is not None and base is not None:
            for tile in tiles(dz.shape[1]):
                d = dz[:, tile].to(self.columns.dtype)
                each = torch.where(d != 0, d * base[:, tile].to(d.dtype), 0.0)
                part(self.columns, tile).add_(each.sum(0))

    def all(self) -> list[Tensor | None]:
        return [self.down, self.up, self.columns]
