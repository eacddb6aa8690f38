"""A signal ends every call that can run long, at once, with what its handler raises and nothing else."""

import json
import os
import statistics
import subprocess
import sys

import pytest
from byte_tokenizer import write_folder
from places import child_path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="no signals of a process to itself"),
]

# Seconds from the signal to what it raised, by call; None where the call was over before.
SCRIPT = """
import json, os, random, signal, sys, tempfile, threading, time
import numpy as np
from dpo_ext import PairDataset, Ragged, Tokenizer, pack_lengths

name, folder, raises = sys.argv[1:]
class Told(TimeoutError): ...
def handler(*_):
    raise Told("said the handler") if raises == "Told" else KeyboardInterrupt()
signal.signal(signal.SIGINT, handler)
kind = Told if raises == "Told" else KeyboardInterrupt
rng = np.random.default_rng(0)

def ragged(n, each=1):
    return Ragged(np.zeros(n * each, np.int32), np.arange(0, n * each + 1, each, dtype=np.int64))

def prepared():
    if name in ("from_rows", "mapping", "encode", "encode_batch", "decode", "render", "generator"):
        tokenizer = Tokenizer.from_pretrained(folder)
    if name == "from_rows":
        rows = [{"prompt": "why %d?" % i, "chosen": " because", "rejected": " no"} for i in range(1000)] * 400
        return lambda: PairDataset.from_rows(rows, tokenizer)
    if name == "generator":
        row = {"prompt": "why?", "chosen": " because", "rejected": " no"}
        return lambda: PairDataset.from_rows((row for _ in range(10**7)), tokenizer)
    if name == "encode":
        text = "hello the world " * 1_500_000
        return lambda: tokenizer.encode(text)
    if name == "encode_batch":
        texts = ["hello the world"] * 3_000_000
        return lambda: tokenizer.encode_batch(texts)
    if name == "decode":
        ids = np.full(8_000_000, 104, np.int32)
        return lambda: tokenizer.decode(ids)
    if name == "render":
        messages = [{"role": "user", "content": "hello " * 10}] * 60_000
        return lambda: tokenizer.apply_chat_template(messages)
    if name == "pack_lengths":
        lengths = rng.integers(1, 2000, 12_000_000)
        return lambda: pack_lengths(lengths, 2048)
    if name == "sparse":
        lengths = rng.integers(1, 2000, 3_000_000)
        return lambda: pack_lengths(lengths, 1 << 23)
    if name in ("packed", "padded", "shuffled"):
        pairs = PairDataset.from_ids(*[ragged(6_000_000)] * 3)
        layout = "padded" if name == "padded" else "packed"
        return lambda: pairs.plan(layout=layout, tokens_per_batch=4096)
    if name == "from_ids":
        ids = ragged(100_000_000)
        return lambda: PairDataset.from_ids(ids, ids, ids)
    if name == "digest":
        pairs = PairDataset.from_ids(*[ragged(40_000_000)] * 3)
        return lambda: pairs.contents
    if name in ("save", "load"):
        pairs = PairDataset.from_ids(*[ragged(1_000_000, 60)] * 3)
        where = tempfile.mkdtemp(dir=folder)
        if name == "save":
            pairs.contents
            return lambda: pairs.save(where)
        pairs.save(where)
        return lambda: PairDataset.load(where)
    raise ValueError(name)

work, waits = prepared(), []
sys.setswitchinterval(0.001)
for delay in (0.02, 0.05, 0.12):
    sent = []
    def fire():
        time.sleep(delay)
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)
    thread = threading.Thread(target=fire)
    try:
        thread.start()
        work()
        over = True
        thread.join()
        time.sleep(1)
    except kind as error:
        waits.append(None if "over" in globals() else time.perf_counter() - sent[0])
    globals().pop("over", None)
    thread.join()
print(json.dumps(waits))
"""
CALLS = (
    "from_rows",
    "generator",
    "encode",
    "encode_batch",
    "decode",
    "render",
    "pack_lengths",
    "sparse",
    "packed",
    "padded",
    "from_ids",
    "digest",
    "save",
    "load",
)


def waits_of(name, folder, raises):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name, str(folder), raises],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": child_path()},
        check=False,
    )
    # Nothing else is raised, and nothing is said.
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-2000:]
    return [seconds for seconds in json.loads(done.stdout) if seconds is not None]


@pytest.mark.parametrize("name", CALLS)
def test_ctrl_c_ends_the_call(tmp_path, name):
    write_folder(tmp_path)
    waits = waits_of(name, tmp_path, "KeyboardInterrupt")
    # 200 ms are promised, and machines that run tests are busy.
    assert waits
    assert statistics.median(waits) < 0.5, waits


@pytest.mark.parametrize(
    "name", ["from_rows", "generator", "encode", "packed", "from_ids", "save", "load"]
)
def test_what_another_handler_raises_comes_out_of_the_call(tmp_path, name):
    write_folder(tmp_path)
    assert waits_of(name, tmp_path, "Told")


FIRST = """
import os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)
def fire():
    time.sleep(float(sys.argv[2]))
    os.kill(os.getpid(), signal.SIGINT)
from dpo_ext import PairDataset, Tokenizer
try:
    threading.Thread(target=fire, daemon=True).start()
    tokenizer = Tokenizer.from_pretrained(sys.argv[1])
    PairDataset.from_rows([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 200_000, tokenizer)
    time.sleep(5)
except KeyboardInterrupt:
    os._exit(7)
os._exit(8)
"""


def test_ctrl_c_in_the_first_call_of_a_process_is_that_and_no_panic(tmp_path):
    write_folder(tmp_path)
    for delay in (0.001, 0.005, 0.02, 0.05, 0.1, 0.2):
        done = subprocess.run(
            [sys.executable, "-c", FIRST, str(tmp_path), str(delay)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": child_path()},
            check=False,
        )
        assert (done.returncode, done.stderr) == (7, ""), (delay, done.stderr[-2000:])


# In a process of its own: what handles the signal here is the test runner's.
INTERRUPTED = """
import signal, sys
from collections.abc import Mapping
from dpo_ext import PairDataset, Tokenizer

class Slow(Mapping):
    def __getitem__(self, key):
        return "user" if key == "role" else "hello"

    def __iter__(self):
        signal.raise_signal(signal.SIGINT)
        return iter(("role", "content"))

    def __len__(self):
        return 2

try:
    PairDataset.from_rows(
        [{"prompt": [Slow()], "chosen": "a", "rejected": "b"}], Tokenizer.from_pretrained(sys.argv[1])
    )
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.slow
def test_a_row_whose_own_code_is_interrupted_is_no_bad_row(tmp_path):
    write_folder(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, tmp_path],
        env={**os.environ, "PYTHONPATH": child_path()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")
