"""Children that need a fresh Python, without its start: a server that has imported once, and forks.

For code that must run in a process of its own and asks nothing of how that process came to be. What
tests starting, imports, signals or variables that are read at the start runs in a real one.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from functools import cache
from subprocess import CompletedProcess
from typing import Any

TORCH = ("torch", "dpo_ext.torch")
NUMPY = ("dpo_ext",)

SERVER = """
import gc, importlib, json, os, signal, socket, sys, traceback
for name in sys.argv[2].split(","):
    importlib.import_module(name)
gc.freeze()  # a child's first collection copies no page
asked = socket.socket(fileno=int(sys.argv[1]))
while True:
    size, fds, _, _ = socket.recv_fds(asked, 8, 2)
    if not size:
        os._exit(0)
    data = b""
    while len(data) < int.from_bytes(size, "big"):
        data += asked.recv(1 << 16)
    request = json.loads(data)
    child = os.fork()
    if child:
        for fd in fds:
            os.close(fd)
        asked.sendall(child.to_bytes(8, "big"))
        _, status, used = os.wait4(child, 0)
        asked.sendall(int(1e6 * (used.ru_utime + used.ru_stime)).to_bytes(8, "big"))
        asked.sendall(status.to_bytes(8, "big"))
        continue
    asked.close()
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for target, fd in enumerate(fds, 1):
        os.dup2(fd, target)
        os.close(fd)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv[:] = ["-c", *request["arguments"]]
    sys.path[:] = request["path"]
    break
exec(compile(request["code"], "<child>", "exec"), {"__name__": "__main__"})
"""


spent = 0.0
"""Seconds of CPU of all children so far; the system counts them for the server."""


class Server:
    """One warm process. It serves one child at a time, and ends with the one that started it."""

    def __init__(self, imports: tuple[str, ...]) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-W", "ignore", "-c", SERVER, str(theirs.fileno())]
        self.socket = ours
        self.process = subprocess.Popen(
            [*command, ",".join(imports)],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        atexit.register(self.close)

    def close(self) -> None:
        self.socket.close()
        self.process.wait()

    def _number(self) -> int:
        got = b""
        while len(got) < 8:
            part = self.socket.recv(8 - len(got))
            assert part, "the server of warm processes has ended"
            got += part
        return int.from_bytes(got, "big")

    def _spend(self) -> None:
        global spent
        spent += self._number() / 1e6

    def run(self, request: dict[str, Any], timeout: float) -> tuple[int, str, str]:
        """Return code as `subprocess` gives it, output and errors."""
        files = [os.memfd_create(name) for name in ("output", "errors")]
        data = json.dumps(request).encode()
        try:
            socket.send_fds(self.socket, [len(data).to_bytes(8, "big")], files)
            self.socket.sendall(data)
            child = self._number()
            self.socket.settimeout(timeout)
            try:
                self._spend()
                status = self._number()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)  # and what it has started
                self.socket.settimeout(None)
                self._spend()
                self._number()
                raise subprocess.TimeoutExpired(request["code"], timeout) from None
            finally:
                self.socket.settimeout(None)
            said = []
            for fd in files:
                os.lseek(fd, 0, os.SEEK_SET)
                with os.fdopen(os.dup(fd), encoding="utf-8", errors="replace") as file:
                    said.append(file.read())
        finally:
            for fd in files:
                os.close(fd)
        return os.waitstatus_to_exitcode(status), said[0], said[1]


server = cache(Server)


def run(
    code: str,
    *arguments: Any,
    imports: tuple[str, ...] = TORCH,
    env: dict[str, str] | None = None,
    timeout: float = 120,
) -> CompletedProcess[str]:
    """As ``subprocess.run([sys.executable, "-c", code, *arguments], ...)`` with the output captured.

    ``env`` is added to ours; what is read before ``code`` runs (PYTHONHASHSEED) has no effect.
    """
    request = {
        "code": code,
        "arguments": [str(a) for a in arguments],
        "env": {**os.environ, **(env or {})},
        "cwd": os.getcwd(),  # noqa: PTH109
        "path": ["", *sys.path],
    }
    return CompletedProcess(code, *server(imports).run(request, timeout))


RANKS = """
import importlib, os, signal, sys, traceback
module, function, count, *arguments = sys.argv[1:]
function = getattr(importlib.import_module(module), function)
ranks = {}
for rank in range(int(count)):
    child = os.fork()
    if not child:
        failed = True
        try:
            function(rank, *arguments)
            failed = False
        except BaseException:
            print(f"rank {rank}:", file=sys.stderr)
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(failed)
    ranks[child] = rank
failed = 0
while ranks:
    child, status = os.wait()
    del ranks[child]
    failed |= status != 0
    for other in ranks if status else ():  # it would wait for the one that is gone
        os.kill(other, signal.SIGKILL)
sys.exit(failed)
"""


def ranks(
    module: str,
    function: str,
    *arguments: Any,
    count: int = 2,
    imports: tuple[str, ...] = TORCH,
    timeout: float = 240,
) -> str:
    """Calls ``function(rank, *arguments)`` of a test file in processes; the arguments are texts.
    What they print.

    A process ends as the function does, nothing is torn down: do not destroy a process group, which
    would wait, holding the GIL, for a thread of Gloo that wants it, where DDP had the group last.
    """
    done = run(RANKS, module, function, count, *arguments, imports=imports, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
