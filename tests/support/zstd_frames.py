"""zstd frames made by hand, RFC 8878: raw and run-length blocks, checksums, odd headers; no package is needed."""

MASK = 2**64 - 1
P1, P2, P3, P4, P5 = (
    11400714785074694791,
    14029467366897019727,
    1609587929392839161,
    9650029242287828579,
    2870177450012600261,
)


def _rotate(x, n):
    return ((x << n) | (x >> (64 - n))) & MASK


def _round(lane, word):
    return _rotate((lane + word * P2) & MASK, 31) * P1 & MASK


def xxh64(data):
    """XXH64 of bytes, seed 0."""
    at, size = 0, len(data)
    if size >= 32:
        lanes = [(P1 + P2) & MASK, P2, 0, -P1 & MASK]
        while at + 32 <= size:
            for i in range(4):
                word = int.from_bytes(data[at + 8 * i : at + 8 * i + 8], "little")
                lanes[i] = _round(lanes[i], word)
            at += 32
        h = sum(_rotate(lane, n) for lane, n in zip(lanes, (1, 7, 12, 18), strict=True)) & MASK
        for lane in lanes:
            h = ((h ^ _round(0, lane)) * P1 + P4) & MASK
    else:
        h = P5
    h = (h + size) & MASK
    while at + 8 <= size:
        h ^= _round(0, int.from_bytes(data[at : at + 8], "little"))
        h = (_rotate(h, 27) * P1 + P4) & MASK
        at += 8
    if at + 4 <= size:
        h ^= int.from_bytes(data[at : at + 4], "little") * P1 & MASK
        h = (_rotate(h, 23) * P2 + P3) & MASK
        at += 4
    for byte in data[at:]:
        h ^= byte * P5 & MASK
        h = _rotate(h, 11) * P1 & MASK
    h = (h ^ h >> 33) * P2 & MASK
    h = (h ^ h >> 29) * P3 & MASK
    return h ^ h >> 32


def block(data, *, last, repeat=None):
    """A raw block, or one of `repeat` copies of one byte."""
    size, kind = (len(data), 0) if repeat is None else (repeat, 1)
    return (last | kind << 1 | size << 3).to_bytes(3, "little") + data


def header(window_log=17, *, checksum=True):
    """Magic and header of a frame that does not tell its size."""
    return b"\x28\xb5\x2f\xfd" + bytes([checksum << 2, (window_log - 10) << 3])


def frame(data, *, blocks=1, checksum=True, window_log=17):
    """`data` as one frame of raw blocks."""
    step = -(-len(data) // blocks) or 1
    parts = [data[i : i + step] for i in range(0, len(data), step)] or [b""]
    body = b"".join(block(part, last=i == len(parts) - 1) for i, part in enumerate(parts))
    tail = (xxh64(data) & 0xFFFFFFFF).to_bytes(4, "little") if checksum else b""
    return header(window_log, checksum=checksum) + body + tail


def skippable(data, kind=0):
    """A frame that readers pass over."""
    return bytes([0x50 + kind]) + b"\x2a\x4d\x18" + len(data).to_bytes(4, "little") + data


def bomb(byte, size):
    """`size` copies of `byte`, 4 bytes for each 128 KiB."""
    step = 1 << 17
    whole = block(byte, last=False, repeat=step) * (size // step - 1)
    return header(checksum=False) + whole + block(byte, last=True, repeat=step)
