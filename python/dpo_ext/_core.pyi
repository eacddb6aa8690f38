__all__ = [
    "FileEncoder",
    "FileText",
    "KeyTable",
    "PairEncoder",
    "Tokenizer",
    "__version__",
    "batch_sizes",
    "batches_by_slots",
    "begin_section",
    "blocks_into",
    "check_ids",
    "dpo_loss",
    "end_section",
    "epoch_bins",
    "epoch_order",
    "example_keys",
    "hash_bytes",
    "logits_grad",
    "logits_grad_",
    "pack_into",
    "pack_lengths",
    "pad_into",
    "pair_means",
    "scan",
    "segment_grad",
    "segment_sum",
    "share_into",
    "token_stats",
    "tokenizer_outline",
]
__version__: str

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, final

from numpy import bool_, float32, float64, int32, int64, uint8, uint64
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
    sums: tuple[_Float | None, NDArray[int32]] | None = None,
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
def segment_grad(
    grad: _Float, weights: _Float | None, seq_offsets: NDArray[int32], tokens: int
) -> _Float: ...
def segment_sum(values: _Float, weights: _Float | None, seq_offsets: NDArray[int32]) -> _Float: ...

_Pairs = TypeVar("_Pairs", NDArray[float32], NDArray[float64])

def dpo_loss(
    logps: _Pairs,
    ref_logps: _Pairs,
    beta: float,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[_Pairs, _Pairs, _Pairs]: ...
def pair_means(logps: _Pairs, ref_logps: _Pairs | None, scale: float) -> _Pairs: ...

_Ids = NDArray[int32]
_Offsets = NDArray[int64]
_Ragged = tuple[_Ids, _Offsets]

def tokenizer_outline(json: bytes) -> str: ...

@final
class Tokenizer:
    def __new__(
        cls,
        json: bytes,
        named: list[tuple[str, str]],
        added: list[tuple[Any, ...]],
        split_special: bool,
        ids: tuple[int | None, int | None, int | None],
        template: str | None,
        tool_template: str | None,
        fallback: Callable[[str, str, str], str | None] | None,
    ) -> Tokenizer: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def refusal(self) -> str | None: ...
    @property
    def template_refusal(self) -> str | None: ...
    def reads(self, name: str) -> bool: ...
    @property
    def variables(self) -> list[str]: ...
    @property
    def merged(self) -> list[str]: ...
    @property
    def gaps(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def pad_id(self) -> int | None: ...
    def encode(self, text: str, add_special_tokens: bool) -> _Ids: ...
    def decode(self, ids: _Ids) -> str: ...
    def encode_batch(
        self, texts: Iterable[str], add_special_tokens: bool, threads: int | None
    ) -> _Ragged: ...
    def encode_arrow(
        self,
        chunks: list[tuple[NDArray[uint8], _Offsets]],
        add_special_tokens: bool,
        threads: int | None,
    ) -> _Ragged: ...
    def apply_chat_template(
        self,
        messages: Any,
        add_generation_prompt: bool,
        variables: dict[str, Any],
        time: tuple[int, int, int, int, int, int, int, int],
    ) -> str: ...

@final
class FileEncoder:
    def __new__(cls, paths: list[str], tokenizer: Tokenizer, settings: Any) -> FileEncoder: ...
    def next(
        self, pairs: int, callback: Callable[[int, int], Any] | None = None
    ) -> dict[str, Any] | None: ...

@final
class FileText:
    def __new__(cls, path: str, limits: Any, delimiter: int | None = None) -> FileText: ...
    @property
    def unpacked(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    def head(self) -> bytes: ...
    def read(self, size: int) -> bytes: ...
    def close(self) -> None: ...

@final
class PairEncoder:
    def __new__(
        cls,
        tokenizer: Tokenizer,
        settings: Any,
        callback: Callable[[int, int], Any] | None = None,
    ) -> PairEncoder: ...
    @property
    def names(self) -> list[str]: ...
    @property
    def kept(self) -> int: ...
    def add_files(self, paths: list[str]) -> None: ...
    def add_rows(self, rows: Iterable[Any], strip_nulls: bool) -> None: ...
    def add_columns(
        self,
        rows: int,
        columns: list[tuple[Any, ...] | None],
        buffers: list[NDArray[uint8]],
        path: str | None,
        first: int,
        done: int,
        others: list[str],
    ) -> None: ...
    def finish(self) -> dict[str, Any]: ...

def scan(paths: list[str], vocab_size: int, settings: Any) -> tuple[int, int]: ...
def check_ids(name: str, values: _Ids, offsets: _Offsets, vocab_size: int | None) -> None: ...
def batch_sizes(
    prompt: _Ragged, chosen: _Ragged, rejected: _Ragged, index: NDArray[int64]
) -> tuple[int, int, int]: ...
def pad_into(
    prompt: _Ragged,
    chosen: _Ragged,
    rejected: _Ragged,
    index: NDArray[int64],
    pad_id: int,
    input_ids: NDArray[int64],
    attention_mask: NDArray[int64],
    completion_mask: NDArray[int64],
    logit_rows: NDArray[int64],
    targets: NDArray[int32],
    seq_offsets: NDArray[int32],
) -> None: ...
def pack_lengths(
    lengths: NDArray[int64], capacity: int, seed: int
) -> tuple[NDArray[int32], NDArray[int64]]: ...
def pack_into(
    prompt: _Ragged,
    chosen: _Ragged,
    rejected: _Ragged,
    index: NDArray[int64],
    bounds: NDArray[int64],
    pad_id: int,
    input_ids: NDArray[int64],
    position_ids: NDArray[int64],
    cu_seq_lens: NDArray[int32],
    logit_rows: NDArray[int64],
    targets: NDArray[int32],
    seq_offsets: NDArray[int32],
) -> tuple[int, int]: ...
def share_into(
    prompt: _Ragged,
    chosen: _Ragged,
    rejected: _Ragged,
    index: NDArray[int64],
    bounds: NDArray[int64],
    pad_id: int,
    input_ids: NDArray[int64],
    position_ids: NDArray[int64],
    doc: NDArray[int32],
    seg: NDArray[int32],
    cu_seq_lens_q: NDArray[int32],
    cu_seq_lens_k: NDArray[int32],
    kv_rows: NDArray[int64],
    logit_rows: NDArray[int64],
    targets: NDArray[int32],
    seq_offsets: NDArray[int32],
) -> tuple[int, int, int, int]: ...
def blocks_into(
    doc: NDArray[int32],
    seg: NDArray[int32],
    width: int,
    kv_num_blocks: NDArray[int32],
    kv_indices: NDArray[int32],
    full_kv_num_blocks: NDArray[int32],
    full_kv_indices: NDArray[int32],
    q_num_blocks: NDArray[int32],
    q_indices: NDArray[int32],
    full_q_num_blocks: NDArray[int32],
    full_q_indices: NDArray[int32],
) -> None: ...
def begin_section() -> None: ...
def end_section() -> None: ...
def epoch_bins(
    lengths: NDArray[int64], capacity: int, seed: int, epoch: int, shuffle: bool
) -> tuple[NDArray[int64], NDArray[int64]]: ...
def epoch_order(
    n: int, seed: int, epoch: int, shuffle: bool, start: int, stop: int
) -> NDArray[int64]: ...
def batches_by_slots(
    longest: NDArray[int64], budget: int, multiple: int, seed: int, epoch: int, shuffle: bool
) -> NDArray[int64]: ...

_Keys = NDArray[uint64]
_Rows = NDArray[int64]

def hash_bytes(bytes: NDArray[uint8]) -> bytes: ...
def example_keys(
    prompt: _Ragged, sides: Sequence[tuple[_Ids, _Offsets, _Float | None]], index: _Rows
) -> _Keys: ...

@final
class KeyTable:
    def __new__(cls) -> KeyTable: ...
    def __len__(self) -> int: ...
    def reserve(self, more: int) -> None: ...
    def add(self, keys: _Keys) -> _Rows: ...
    def find(self, keys: _Keys) -> _Rows: ...
