"""A fork beside whatever other threads do: the child works, or gets a typed error, and holds no lock."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from byte_tokenizer import tokenizer, write_folder
from places import child_path

from dpo_ext import PairDataset
from dpo_ext.store.folder import writing

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
ROWS = [{"prompt": "why?", "chosen": " because", "rejected": " no"}] * 40

HEAD = """
import os, sys, threading, time
from dpo_ext import PairDataset, Tokenizer, _core
from dpo_ext.errors import DpoExtError

def child(work):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    stop = time.monotonic() + 20
    while time.monotonic() < stop:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return -1
"""


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", HEAD + script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": child_path()},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def child(work):
    """The exit status of a child that does it; -9 where it hangs."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    stop = time.monotonic() + 20
    while time.monotonic() < stop:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.slow
def test_a_child_that_was_forked_beside_the_first_load_can_load(tmp_path):
    write_folder(tmp_path)
    script = """
path, delay = sys.argv[1], float(sys.argv[2])
threading.Thread(target=Tokenizer.from_pretrained, args=(path,)).start()
time.sleep(delay)
print(child(lambda: Tokenizer.from_pretrained(path).encode("hello")))
"""
    for delay in (0.001, 0.003, 0.01, 0.02, 0.04, 0.08):
        assert run(script, tmp_path, delay) == "0", delay


@pytest.mark.slow
def test_a_child_that_was_forked_beside_the_first_pools_has_its_own(tmp_path):
    write_folder(tmp_path)
    script = """
tokenizer = Tokenizer.from_pretrained(sys.argv[1])
rows = [{"prompt": "why?", "chosen": " because", "rejected": " no"}] * 100
for threads in range(2, 12):
    def work():
        return len(PairDataset.from_rows(rows, tokenizer, threads=threads))
    other = threading.Thread(target=work)
    other.start()
    time.sleep(0.0003 * threads)
    if status := child(lambda: os._exit(0 if work() == 100 else 3)):
        print(threads, status)
    other.join()
"""
    assert run(script, tmp_path) == ""


@pytest.mark.slow
def test_a_child_of_a_process_that_never_ends_its_load_gets_a_typed_error(tmp_path):
    write_folder(tmp_path)
    script = """
threading.Thread(target=lambda: (_core.begin_section(), time.sleep(60)), daemon=True).start()
time.sleep(0.1)
def work():
    try:
        Tokenizer.from_pretrained(sys.argv[1])
    except DpoExtError as error:
        os._exit(5 if "was forked while another thread" in str(error) else 6)
print(os.waitstatus_to_exitcode(child(work)), flush=True)
os._exit(0)
"""
    assert run(script, tmp_path) == "5"


def test_a_section_of_the_thread_that_forks_holds_nothing_up():
    from dpo_ext import _core

    _core.begin_section()
    try:
        begun = time.monotonic()
        assert child(lambda: (_core.begin_section(), _core.end_section())) == 0
        assert time.monotonic() - begun < 5
    finally:
        _core.end_section()
    assert child(lambda: (_core.begin_section(), _core.end_section())) == 0


def test_a_child_does_not_wait_for_what_a_thread_was_counting(monkeypatch):
    pairs = PairDataset.from_ids([[1]], [[2]], [[3]])
    begun, count = threading.Event(), PairDataset.by_lengths

    def by_lengths(pairs, how):
        begun.set()
        if threading.current_thread() is not threading.main_thread():
            time.sleep(2)
        return count(pairs, how)

    monkeypatch.setattr(PairDataset, "by_lengths", by_lengths)
    thread = threading.Thread(target=lambda: pairs.tokens)
    thread.start()
    begun.wait()
    started = time.monotonic()
    assert child(lambda: pairs.tokens) == 0
    assert time.monotonic() - started < 1.5
    thread.join()


def free(folder):
    """Whether somebody else could have the lock at once."""
    import fcntl

    with (folder / ".lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_a_child_that_lives_on_holds_no_lock_of_its_parent(tmp_path):
    pairs = PairDataset.from_ids([[1]], [[2]], [[3]])
    pairs.save(tmp_path)
    with writing(tmp_path):
        pid = os.fork()
        if pid == 0:
            time.sleep(30)
            os._exit(0)
        assert not free(tmp_path)
    try:
        assert free(tmp_path)
        pairs.save(tmp_path)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_child_that_leaves_the_block_frees_no_lock_of_its_parent(tmp_path):
    PairDataset.from_ids([[1]], [[2]], [[3]]).save(tmp_path)
    with writing(tmp_path):
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
            assert not free(tmp_path)
    if pid == 0:
        os._exit(0)
    assert free(tmp_path)


@pytest.mark.slow
def test_the_lock_of_a_process_that_was_killed_is_free_though_its_child_lives(tmp_path):
    PairDataset.from_ids([[1]], [[2]], [[3]]).save(tmp_path)
    script = """
from pathlib import Path
from dpo_ext.store.folder import writing
with writing(Path(sys.argv[1])):
    pid = os.fork()
    if pid == 0:
        os.close(1)
        os.close(2)
        time.sleep(20)
        os._exit(0)
    print(pid, flush=True)
    os.kill(os.getpid(), 9)
"""
    done = subprocess.run(
        [sys.executable, "-c", HEAD + script, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": child_path()},
        check=False,
    )
    try:
        assert free(tmp_path)
    finally:
        os.kill(int(done.stdout), signal.SIGKILL)


@pytest.mark.slow
def test_a_child_encodes_while_threads_of_its_parent_encode(tmp_path):
    own = tokenizer(tmp_path)
    stop = threading.Event()

    def encode():
        while not stop.is_set():
            PairDataset.from_rows(ROWS, own, threads=2)

    threads = [threading.Thread(target=encode) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(15):
            assert child(lambda: PairDataset.from_rows(ROWS, own, threads=2)) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
