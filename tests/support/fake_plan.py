"""A plan whose batches are numbers: what it was asked for and from which thread, it remembers."""

from __future__ import annotations

import threading
import time

import torch


class FakeBatch:
    def __init__(self, i, epoch, where="host"):
        self.i, self.epoch, self.where = i, epoch, where

    def to(self, device, *, non_blocking=False):
        return FakeBatch(self.i, self.epoch, str(torch.device(device)))


class FakePlan:
    """Counts what was built; batch `bad` cannot be."""

    def __init__(self, n, *, bad=None, seconds=0.0):
        self.n, self.bad, self.seconds, self.epoch = n, bad, seconds, 0
        self.built = []

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        time.sleep(self.seconds)
        self.built.append((i, threading.current_thread() is threading.main_thread()))
        if i == self.bad:
            raise KeyError(f"batch {i}")
        return FakeBatch(i, self.epoch)

    def set_epoch(self, epoch):
        self.epoch = epoch
