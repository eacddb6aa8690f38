"""Digests of the parameters of a model, from files of safetensors or from memory.

Both ways give the same for the same tensors: (dtype, shape, digest of the bytes) by name.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dpo_ext.errors import RefLogpsError
from dpo_ext.store.folder import cores
from dpo_ext.store.notes import noted

Tensors = Mapping[str, tuple[str, tuple[int, ...], str]]

MAX_HEADER_BYTES = 100 << 20
READ_BYTES = 1 << 20
# Bits of an item; of a dtype that is not here, the number of bytes is not checked.
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16}
BITS |= {"BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64}
NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
}
FLOATS = {short: name for name, short in NAMES.items() if "float" in name}


def of_files(files: Iterable[Path], notes: Path | None) -> Tensors:
    """Of all tensors in files of safetensors, each file read once as long as it stays as it is.

    Args:
        notes: where that is noted; None to read them again each time.

    Raises:
        RefLogpsError: a file is damaged, or two files hold a tensor of one name.
    """
    tensors: dict[str, tuple[str, tuple[int, ...], str]] = {}
    for path in files:
        found = json.loads(noted(notes, str(path), _digests))
        if "damage" in found:
            raise RefLogpsError(f"{path}: {found['damage']}\nhint: copy or download it again")
        if twice := tensors.keys() & found["tensors"].keys():
            raise RefLogpsError(
                f"{path}: `{min(twice)}` is in another file of the folder too\n"
                "hint: leave only the files of one model in the folder"
            )
        for name, (dtype, shape, digest) in found["tensors"].items():
            tensors[name] = (dtype, tuple(shape), digest)
    return tensors


def of_state(state: Mapping[str, Any]) -> Tensors:
    """Of a `state_dict`; of tensors that share their memory, the first by name of its order.

    Raises:
        RefLogpsError: a tensor is not whole, as of a sharded or an offloaded model.
    """
    tensors: dict[str, tuple[str, tuple[int, ...], str]] = {}
    seen = set()
    for name, value in state.items():
        if not hasattr(value, "detach"):  # what modules of quantisation add
            if value is not None:
                tensors[name] = ("object", (), hashlib.sha256(repr(value).encode()).hexdigest())
            continue
        if hasattr(value, "full_tensor") or value.is_meta:
            where = "sharded" if hasattr(value, "full_tensor") else "not in memory"
            raise RefLogpsError(
                f"`{name}` is {where}, its bytes cannot be told from here\n"
                "hint: give the folder that the model was loaded from"
            )
        place = (value.data_ptr(), tuple(value.shape), tuple(value.stride()), value.device)
        if value.numel() and place in seen:
            continue
        seen.add(place)
        dtype = str(value.dtype).removeprefix("torch.")
        data = value.detach().cpu().contiguous().reshape(-1)
        data = data.view(dtype=_bytes_of(data)).numpy() if data.numel() else b""
        tensors[name] = (
            NAMES.get(dtype, dtype),
            tuple(value.shape),
            hashlib.sha256(data).hexdigest(),
        )
    return tensors


def digest_of(tensors: Tensors) -> str:
    """Of all: names, dtypes, shapes and bytes."""
    text = json.dumps([[name, *tensors[name]] for name in sorted(tensors)])
    return hashlib.sha256(text.encode()).hexdigest()


def dtypes_of(tensors: Tensors) -> str:
    """The dtypes of the floating-point tensors, as torch calls them."""
    return "+".join(sorted({FLOATS[dtype] for dtype, _, _ in tensors.values() if dtype in FLOATS}))


def _bytes_of(data: Any) -> Any:
    import torch

    return torch.uint8 if data.dtype != torch.bool else torch.bool


def _digests(fd: int, size: int) -> str:
    """Of the tensors in one file, as JSON; what is wrong with it otherwise."""
    try:
        places = _places(fd, size)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        said = str(error) if type(error) is ValueError else type(error).__name__
        return json.dumps({"damage": f"expected safetensors: {said}"})

    def one(place: tuple[str, list[int], int, int]) -> tuple[str, list[int], str]:
        dtype, shape, start, stop = place
        digest, room = hashlib.sha256(), bytearray(min(READ_BYTES, stop - start))
        while start < stop and not left:
            view = memoryview(room)[: stop - start]
            count = os.preadv(fd, [view], start)
            if count == 0:
                raise RefLogpsError("the file was cut while it was read")
            digest.update(view[:count])
            start += count
        return dtype, shape, digest.hexdigest()

    pool, left = ThreadPoolExecutor(cores()), []
    try:
        done = pool.map(one, places.values())
        return json.dumps({"tensors": dict(zip(places, done, strict=True))})
    finally:
        # After a signal, too, no more than one read a thread is waited for.
        left.append(True)
        pool.shutdown(cancel_futures=True)


def _places(fd: int, size: int) -> dict[str, tuple[str, list[int], int, int]]:
    """Dtype, shape, first and last byte of each tensor, checked against the size of the file."""
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = json.loads(os.pread(fd, length, 8))
    base, places, last = 8 + length, {}, 0
    for name, info in header.items():
        if name == "__metadata__":
            continue
        dtype, shape = str(info["dtype"]), [int(n) for n in info["shape"]]
        first, end = (int(n) for n in info["data_offsets"])
        items = math.prod(shape)
        if not 0 <= first <= end <= size - base or min(shape, default=0) < 0:
            raise ValueError(f"`{name}` does not lie in the file")
        if dtype in BITS and items * BITS[dtype] != 8 * (end - first):
            raise ValueError(f"`{name}` has {end - first} bytes, which are not {shape} of {dtype}")
        places[name] = (dtype, shape, base + first, base + end)
        last = max(last, end)
    if base + last != size:
        raise ValueError(f"tensors end at byte {base + last} of {size}")
    return places
