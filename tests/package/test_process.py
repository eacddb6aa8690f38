"""Processes and threads: forks, signals, globals; each case in a child with a watchdog."""

import gc
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from byte_tokenizer import tokenizer, write_folder
from places import ROOT

from dpo_ext import PairDataset

pytestmark = pytest.mark.slow

SOURCE = ROOT / "python"
ROWS = [{"prompt": f"q {i}: ", "chosen": f"yes {i} the", "rejected": f"no {i}"} for i in range(300)]

CHILD = """
import hashlib, json, multiprocessing, sys
import dpo_ext

def digest(tokenizer, rows, threads=None):
    pairs = dpo_ext.PairDataset.from_rows(rows, tokenizer, threads=threads)
    return hashlib.sha256(pairs.chosen_ids.values.tobytes()).hexdigest()

def work(queue, tokenizer, rows):
    heavy = [name for name in ("torch", "cupy", "transformers", "datasets") if name in sys.modules]
    queue.put((digest(tokenizer, rows), heavy))

if __name__ == "__main__":
    method, used, folder = sys.argv[1:]
    rows = [{"prompt": f"q {i}: ", "chosen": f"yes {i} the", "rejected": f"no {i}"} for i in range(300)]
    tokenizer = dpo_ext.Tokenizer.from_pretrained(folder)
    want = digest(dpo_ext.Tokenizer.from_pretrained(folder), rows, 1)
    if used == "used":
        assert digest(tokenizer, rows, 2) == want
        assert digest(tokenizer, rows) == want
    context = multiprocessing.get_context(method)
    for workers in (1, 2, 4):
        queue = context.Queue()
        children = [
            context.Process(target=work, args=(queue, tokenizer, rows)) for _ in range(workers)
        ]
        for child in children:
            child.start()
        for _ in children:
            found, heavy = queue.get(timeout=60)
            assert found == want
            assert heavy == [], heavy
        for child in children:
            child.join(60)
            assert child.exitcode == 0
    assert digest(tokenizer, rows, 2) == want
    print("done")
"""


def child(code, *args, env=None, timeout=240, **options):
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", *code, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": str(SOURCE), **(env or {})},
        **options,
    )


@pytest.mark.parametrize("used", ["used", "fresh"])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_encode_the_same_ids_and_load_nothing_heavy(tmp_path, method, used):
    write_folder(tmp_path / "m")
    (tmp_path / "main.py").write_text(CHILD)
    done = child([tmp_path / "main.py"], method, used, tmp_path / "m")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-800:]


def test_a_fork_while_threads_encode_does_not_block_the_child(tmp_path):
    """The fork happens again and again while other threads ask for pools."""
    code = (
        "import os, sys, threading, signal\n"
        "import dpo_ext\n"
        "rows = [{'prompt': 'q', 'chosen': 'a', 'rejected': 'b'}]\n"
        "t = dpo_ext.Tokenizer.from_pretrained(sys.argv[1])\n"
        "stop = False\n"
        "def busy(n):\n"
        "    while not stop: dpo_ext.PairDataset.from_rows(rows, t, threads=n)\n"
        "threads = [threading.Thread(target=busy, args=(n,)) for n in (1, 2, 3)]\n"
        "[x.start() for x in threads]\n"
        "for _ in range(40):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        signal.alarm(60)\n"
        "        assert len(dpo_ext.PairDataset.from_rows(rows, t, threads=2)) == 1\n"
        "        os._exit(0)\n"
        "    assert os.waitpid(pid, 0)[1] == 0\n"
        "stop = True\n"
        "[x.join() for x in threads]\n"
        "print('done')\n"
    )
    write_folder(tmp_path / "m")
    done = child(["-c", code], tmp_path / "m")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-800:]


THREADS = (
    "import sys, os, time, dpo_ext\n"
    "t = dpo_ext.Tokenizer.from_pretrained(sys.argv[1])\n"
    "rows = [{'prompt': 'q', 'chosen': 'a', 'rejected': 'b'}]\n"
    "dpo_ext.PairDataset.from_rows(rows, t)\n"
    "time.sleep(0.5)\n"  # a thread names itself once it runs
    "names = [open(f'/proc/self/task/{x}/comm').read().strip() for x in os.listdir('/proc/self/task')]\n"
    "print(sum(name.startswith('dpo_ext-') for name in names))\n"
)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc")
def test_the_variable_and_the_affinity_bound_the_threads(tmp_path):
    write_folder(tmp_path / "m")
    allowed = os.sched_getaffinity(0)
    one = {min(allowed)}
    cases = [("3", allowed, 3), ("1", allowed, 1), ("", one, 1), ("0", one, 1), ("junk", one, 1)]
    for variable, cores, want in cases:
        done = child(
            ["-c", THREADS],
            tmp_path / "m",
            env={"RAYON_NUM_THREADS": variable},
            preexec_fn=lambda cores=cores: os.sched_setaffinity(0, cores),
        )
        assert done.stdout == f"{want}\n", (variable, done.stderr[-500:])


def test_one_thread_inside_a_worker_of_torchs_loader(monkeypatch):
    import types

    from dpo_ext.data.options import default_threads

    inside = types.SimpleNamespace(get_worker_info=lambda: object())
    monkeypatch.setitem(sys.modules, "torch.utils.data", inside)
    assert default_threads(None) == 1
    assert default_threads(4) == 4
    outside = types.SimpleNamespace(get_worker_info=lambda: None)
    monkeypatch.setitem(sys.modules, "torch.utils.data", outside)
    assert default_threads(None) is None


def test_one_two_and_eight_threads_give_the_same_bytes(tmp_path):
    ours = tokenizer(tmp_path / "m")
    digests = set()
    for threads in (1, 2, 8):
        pairs = PairDataset.from_rows(ROWS * 4, ours, threads=threads)
        columns = (pairs.prompt_ids, pairs.chosen_ids, pairs.rejected_ids)
        raw = b"".join(c.values.tobytes() + c.offsets.tobytes() for c in columns)
        digests.add(hashlib.sha256(raw).hexdigest())
    assert len(digests) == 1


INTERRUPT = (
    "import os, signal, sys, threading, time, dpo_ext\n"
    # A job in the background of a shell begins with SIGINT ignored.
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "t = dpo_ext.Tokenizer.from_pretrained(sys.argv[1])\n"
    "def strike():\n"
    "    time.sleep(float(sys.argv[3])); strike.at = time.monotonic(); os.kill(os.getpid(), signal.SIGINT)\n"
    "threading.Thread(target=strike, daemon=True).start()\n"
    "try:\n"
    "    while True: dpo_ext.PairDataset.from_files(sys.argv[2], t, threads=2, on_bad='skip')\n"
    "except KeyboardInterrupt:\n"
    "    print(time.monotonic() - strike.at)\n"
    "assert len(dpo_ext.PairDataset.from_rows([{'prompt': 'q', 'chosen': 'a', 'rejected': 'b'}], t)) == 1\n"
)


def test_ctrl_c_at_random_times_ends_a_long_call_at_once(tmp_path):
    write_folder(tmp_path / "m")
    line = json.dumps({"prompt": "q ", "chosen": "the word " * 40, "rejected": "no"}) + "\n"
    (tmp_path / "rows.jsonl").write_text(line * 100_000)
    rng = random.Random(3)
    waits = []
    for _ in range(4):
        done = child(
            ["-c", INTERRUPT], tmp_path / "m", tmp_path / "rows.jsonl", rng.uniform(0.05, 0.6)
        )
        assert done.returncode == 0, done.stderr[-800:]
        waits.append(float(done.stdout))
    # 200 ms is the promise; the slack is for a machine that others use.
    assert sorted(waits)[1] < 0.2, waits


def test_another_thread_runs_while_a_long_call_works(tmp_path):
    ours = tokenizer(tmp_path / "m")
    texts = ["the quick brown fox " * 2000] * 300
    ticks, stop = 0, threading.Event()

    def ticker():
        nonlocal ticks
        while not stop.is_set():
            ticks += 1
            time.sleep(0.001)

    thread = threading.Thread(target=ticker)
    thread.start()
    start = time.monotonic()
    ours.encode_batch(texts, threads=1)
    spent, counted = time.monotonic() - start, ticks
    stop.set()
    thread.join()
    assert spent > 0.02
    assert counted > spent / 0.050


def test_two_threads_with_a_short_switch_interval(tmp_path):
    ours = tokenizer(tmp_path / "m")
    want = PairDataset.from_rows(ROWS[:20], ours).chosen_ids.values
    before = sys.getswitchinterval()
    wrong = []

    def loop():
        for _ in range(60):
            got = PairDataset.from_rows(ROWS[:20], ours, threads=2).chosen_ids.values
            if not np.array_equal(got, want):
                wrong.append(got)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=loop, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
    finally:
        sys.setswitchinterval(before)
    assert wrong == []


def test_a_list_that_changes_during_the_call_harms_nothing(tmp_path):
    ours = tokenizer(tmp_path / "m")
    texts = ["hello " * 50] * 2000
    stop = threading.Event()

    def change():
        while not stop.is_set():
            texts[random.randrange(len(texts))] = "x" * random.randrange(300)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(10):
            assert len(ours.encode_batch(texts, threads=2)) == 2000
    finally:
        stop.set()
        thread.join()


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_ten_thousand_calls_leak_nothing(tmp_path):
    ours = tokenizer(tmp_path / "m")
    messages = [{"role": "user", "content": "hello " * 30}]

    def calls(n):
        for _ in range(n):
            ours.apply_chat_template(messages)
            ours.encode("hello the " * 30)
        for _ in range(n // 50):
            PairDataset.from_rows(ROWS[:20], ours, threads=1)
        gc.collect()

    calls(1000)
    before, objects = resident(), len(gc.get_objects())
    calls(10_000)
    assert len(gc.get_objects()) - objects < 200
    assert resident() - before < 8 << 20


def test_nothing_global_is_touched(tmp_path):
    import locale
    import signal

    def state():
        handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
        return (
            random.getstate(),
            np.random.get_state()[1].tobytes(),
            dict(os.environ),
            handlers,
            locale.setlocale(locale.LC_ALL),
            Path.cwd(),
            sys.getswitchinterval(),
            time.tzname,
        )

    before = state()
    ours = tokenizer(tmp_path / "m")
    messages = [{"role": "user", "content": "q"}]
    pairs = PairDataset.from_rows(ROWS, ours)
    answers = [[{"role": "assistant", "content": text}] for text in "yz"]
    row = {"prompt": messages, "chosen": answers[0], "rejected": answers[1]}
    pairs = PairDataset.from_rows([row], ours)
    ours.apply_chat_template(messages)
    ours.encode_batch(["a", "b"], threads=2)
    list(pairs.plan(layout="padded", pairs_per_batch=1))
    list(pairs.plan(layout="packed", tokens_per_batch=64))
    assert state() == before


@pytest.mark.parametrize(
    "env",
    [
        {"LC_ALL": "C", "TZ": "Asia/Tokyo"},
        {"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8"},
        {"HOME": "/nonexistent"},
        {"PYTHONHASHSEED": "7", "PYTHONUTF8": "0"},
    ],
    ids=["C", "Turkish", "no home", "hash seed"],
)
def test_the_surroundings_change_nothing(tmp_path, env):
    code = (
        "import hashlib, os, sys, dpo_ext\n"
        "os.umask(0o777); os.chdir('/')\n"
        "t = dpo_ext.Tokenizer.from_pretrained(sys.argv[1])\n"
        "rows = [{'prompt': f'I {i}: ', 'chosen': f'İı {i}', 'rejected': 'no'} for i in range(50)]\n"
        "p = dpo_ext.PairDataset.from_rows(rows, t)\n"
        "print(hashlib.sha256(p.chosen_ids.values.tobytes()).hexdigest())\n"
    )
    write_folder(tmp_path / "m")
    plain, changed = (child(["-c", code], tmp_path / "m", env=e) for e in ({}, env))
    assert plain.returncode == changed.returncode == 0, changed.stderr[-500:]
    assert plain.stdout == changed.stdout
