"""zstd input: every frame is read, and nothing of a damaged file, with `on_bad="skip"` too."""

import json
import os
import subprocess
import sys

import pytest
from byte_tokenizer import tokenizer
from zstd_frames import bomb, frame, header, skippable

from dpo_ext import DataError, LimitExceeded, PairDataset

ROWS = [{"prompt": "hello ", "chosen": f"the {i}", "rejected": "a"} for i in range(6)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("tokenizer") / "model")


@pytest.fixture
def load(tok, tmp_path):
    """Load bytes as a file, with the options of `from_files`."""

    def load(data, name="rows.jsonl.zst", **options):
        path = tmp_path / name
        path.write_bytes(data)
        return PairDataset.from_files(path, tok, **options)

    return load


@pytest.fixture(scope="module")
def compressed():
    """The text as a real encoder packs it, without a checksum."""
    return pytest.importorskip("pyarrow").Codec("zstd").compress(TEXT, asbytes=True)


def refused(load, data, **options):
    """Raised in both modes; nothing partial."""
    for on_bad in ("error", "skip"):
        with pytest.raises(DataError) as caught:
            load(data, on_bad=on_bad, **options)
        assert caught.value.reason == "bad_input", caught.value
    return caught.value


HALF = len(TEXT) // 2 + 3
WHOLE = {
    "one frame": frame(TEXT),
    "several blocks": frame(TEXT, blocks=5),
    "no checksum": frame(TEXT, checksum=False),
    "two frames, cut inside a line": frame(TEXT[:HALF]) + frame(TEXT[HALF:], checksum=False),
    "an empty frame first": frame(b"") + frame(TEXT),
    "an empty frame last": frame(TEXT) + frame(b""),
    "skippable first": skippable(b"whatever", 3) + frame(TEXT),
    "skippable last": frame(TEXT) + skippable(b"", 15),
    "a frame nested in a skippable one": frame(TEXT[:HALF]) + skippable(frame(TEXT)) + frame(TEXT[HALF:]),
    "a large skippable one": skippable(b"\xff" * 600_000) + frame(TEXT),
    "the widest window allowed": frame(TEXT, window_log=27),
}  # fmt: skip


@pytest.mark.parametrize("data", WHOLE.values(), ids=WHOLE)
def test_every_frame_is_read(load, data):
    pairs = load(data)
    assert pairs.chosen_ids == load(TEXT, name="plain.jsonl").chosen_ids
    assert pairs.report.bytes == len(TEXT)
    # The name does not matter, the first bytes do.
    assert load(data, name="rows.jsonl").chosen_ids == pairs.chosen_ids


def test_what_a_real_encoder_wrote_is_read(load, compressed):
    assert len(compressed) < len(TEXT)
    assert load(compressed + compressed).report.kept == 2 * len(ROWS)


def test_only_skippable_frames_are_no_rows(load):
    assert load(skippable(b"abc") + skippable(TEXT)).report.read == 0


def test_every_truncation_is_raised(load, compressed):
    for data, ends in (
        (frame(TEXT), set()),
        (compressed, set()),
        (skippable(b"ab") + frame(b"") + frame(TEXT[:30]), {10, 23}),
    ):
        for size in range(4, len(data)):
            if size not in ends:
                error = refused(load, data[:size])
                assert "expected a whole zstd frame, found the end of the file" in str(error)


def test_every_flipped_byte_is_raised_or_harmless(load):
    data = frame(TEXT, blocks=2)
    want = load(TEXT, name="plain.jsonl").chosen_ids
    harmless, found = 0, set()
    for at in range(len(data)):
        for mask in (0xFF, 0x01, 0x80):
            damaged = bytearray(data)
            damaged[at] ^= mask
            try:
                pairs = load(bytes(damaged), on_bad="skip")
            except DataError as error:
                found.add((error.reason, error.field, at if error.field else None))
            else:
                assert pairs.chosen_ids == want
                harmless += 1
    assert found == {("bad_input", None, None), ("limit", "zstd_window", 5)}
    assert harmless <= 3  # another window, or a reserved bit


def test_a_damaged_file_is_refused_after_good_blocks(load):
    data = bytearray(frame(TEXT * 2000))  # several blocks of lines come before the checksum
    data[-1] ^= 1
    error = refused(load, bytes(data[:2]) + bytes(data[2:]))
    assert "damaged zstd" in str(error)


@pytest.mark.parametrize("tail", [b"x", b"\0", b"\0" * 600, TEXT, b"\x28", b"\x28\xb5\x2f", b"\x1f\x8b\x08"])  # fmt: skip
def test_garbage_behind_the_last_frame_is_raised(load, tail):
    refused(load, frame(TEXT) + tail)


def test_another_file_of_that_name_is_refused(load):
    error = refused(load, TEXT)
    assert str(error).endswith("expected zstd, as the name says, found other bytes")


@pytest.mark.parametrize("log", [28, 31, 41])
def test_a_wide_window_is_a_limit(load, log):
    for data in (frame(TEXT, window_log=log), frame(TEXT) + header(window_log=log)):
        with pytest.raises(LimitExceeded) as caught:
            load(data, on_bad="skip")
        assert caught.value.field == "zstd_window"


@pytest.mark.slow
def test_bombs_are_limits_in_little_memory(tmp_path):
    tokenizer(tmp_path / "m")
    inner = bomb(b"\n", 96 << 20)
    (tmp_path / "a.jsonl.zst").write_bytes(inner)
    (tmp_path / "b.jsonl.zst").write_bytes(bomb(b"x", 96 << 20))
    (tmp_path / "c.jsonl.zst").write_bytes(bomb(b"\n", 1 << 20) * 100)
    (tmp_path / "d.jsonl.zst").write_bytes(frame(TEXT) + skippable(b"a") + inner)
    code = (
        "import resource, sys, dpo_ext\n"
        "t = dpo_ext.Tokenizer.from_pretrained(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "for path in sys.argv[2:]:\n"
        "    try:\n"
        "        dpo_ext.PairDataset.from_files(path, t, on_bad='skip', threads=1)\n"
        "    except dpo_ext.LimitExceeded as e:\n"
        "        assert e.field == 'max_expansion', e\n"
        "    else:\n"
        "        sys.exit('no limit for ' + path)\n"
    )
    files = sorted(tmp_path.glob("*.zst"))
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "m", *files],
        check=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
