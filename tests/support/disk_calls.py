"""Work that is stopped, or refused by the disk, at its k-th call of the system."""

from __future__ import annotations

import os

CALLS = ("open", "write", "fsync", "rename", "replace", "unlink", "close", "mkdir")


def stop_at(k, what):
    """Makes call number `k` of the disk do `what` instead; returns a function that counts."""
    done = [0]
    for name in CALLS:
        real = getattr(os, name)

        def call(*args, real=real, name=name, **kwargs):
            done[0] += 1
            if done[0] - 1 == k:
                return what(name, real, *args, **kwargs)
            return real(*args, **kwargs)

        setattr(os, name, call)
    return lambda: done[0]


def in_child(work):
    """The exit status of `work` in a fork of this process."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = work() or 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
