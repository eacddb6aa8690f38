"""Losses of pairs that Rust computes in one pass on the CPU: the operator
``torch.ops.dpo_ext.dpo_loss``, which knows no autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_ext import _core
from dpo_ext.layout.graphs import outside_graphs
from dpo_ext.torch.logps.ops import called_plainly

_LIBRARY = torch.library.Library("dpo_ext", "FRAGMENT")
_LIBRARY.define(
    "dpo_loss(Tensor logps, Tensor ref_logps, float beta, float margin, float label_smoothing)"
    " -> (Tensor, Tensor, Tensor)"
)


def dpo_loss(
    logps: Tensor,
    ref_logps: Tensor,
    beta: float,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, ...]:
    """The row ``dpo`` of log-probs (N, 2) of the CPU and numbers: sum of L, L (N,), dL/dc and dL/dr
    side by side (N, 2). The same bits whoever watches the call.
    """
    numbers = (beta, margin, label_smoothing)
    if called_plainly(logps):
        return _on_cpu(logps, ref_logps, *numbers)
    return torch.ops.dpo_ext.dpo_loss(logps, ref_logps, *numbers)


@outside_graphs()
def _on_cpu(logps: Tensor, ref_logps: Tensor, *numbers: float) -> tuple[Tensor, ...]:
    arrays = (logps.detach().contiguous().numpy(), ref_logps.contiguous().numpy())
    return tuple(torch.from_numpy(made) for made in _core.dpo_loss(*arrays, *numbers))


_LIBRARY.impl("dpo_loss", _on_cpu, "CPU")


@torch.library.register_fake("dpo_ext::dpo_loss", lib=_LIBRARY)
def _fake(logps: Tensor, ref_logps: Tensor, *_: float) -> tuple[Tensor, ...]:
    return logps.new_empty(()), logps.new_empty(logps.shape[0]), logps.new_empty(logps.shape)
