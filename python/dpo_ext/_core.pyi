__version__: str

from typing import Any

from numpy import bool_, float32, int32, int64
from numpy.typing import NDArray

_Float = NDArray[float32]
_Shape = tuple[int, int, int]
_Transform = tuple[float, float, float]

def token_stats(
    logits: NDArray[Any],
    dtype: str,
    shape_of: _Shape,
    logit_rows: NDArray[int64],
    targets: NDArray[int32],
    transform_of: _Transform,
    stats: bool,
    threads: int,
) -> tuple[_Float, _Float, _Float, _Float, _Float, _Float, NDArray[bool_]]: ...
def logits_grad(
    logits: NDArray[Any],
    dtype: str,
    shape_of: _Shape,
    logit_rows: NDArray[int64],
    targets: NDArray[int32],
    row_max: _Float,
    row_rest: _Float,
    grad: _Float,
    transform_of: _Transform,
    out: NDArray[Any],
    threads: int,
) -> None: ...
def logits_grad_(
    logits: NDArray[Any],
    dtype: str,
    shape_of: _Shape,
    logit_rows: NDArray[int64],
    targets: NDArray[int32],
    row_max: _Float,
    row_rest: _Float,
    grad: _Float,
    transform_of: _Transform,
    threads: int,
) -> None: ...
def segment_sum(values: _Float, weights: _Float | None, seq_offsets: NDArray[int32]) -> _Float: ...
