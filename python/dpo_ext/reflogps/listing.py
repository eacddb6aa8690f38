"""Which shards a store has, and what became of those that it should have.

The shards themselves are the truth: each says in its name what its bytes are and inside of which
reference it is. The manifest says which reference the store is of, in words, and which shards were
finished, so that a lost one is noticed; where it is damaged it is made anew from the shards.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpo_ext import _core
from dpo_ext.errors import DataError, RefLogpsError
from dpo_ext.reflogps import shards
from dpo_ext.reflogps.identity import Fingerprint
from dpo_ext.store.folder import MANIFEST, damaged
from dpo_ext.store.manifest import MAX_MANIFEST_BYTES, is_sound, sealed, unsealed

FORMAT = "dpo_ext reference log-probs"
VERSION = 1
# Parts in a message.
SHOWN = 8


class Listing:
    """The shards of a folder.

    Attributes:
        loaded: rows, bytes and status of each shard that was read.
        with_tokens: those of them that have the log-probs of tokens, too.
        damaged, foreign, lost: names; see `StoreStats`.
        notes: what there is to say of the manifest.
        soft: lines on soft parts of the fingerprint that differ.
        has_manifest: whether there is a sound one.
    """

    def __init__(self, folder: Path, fingerprint: Fingerprint) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self.loaded: dict[str, tuple[int, int, Any]] = {}
        self.with_tokens: set[str] = set()
        self.damaged: dict[str, Any] = {}
        self.foreign: dict[str, str] = {}
        self.lost: set[str] = set()
        self.notes: list[str] = []
        self.soft: list[str] = []
        self.has_manifest = False
        self._named: list[str] = []
        self._soft: Mapping[str, Any] = {}

    @property
    def is_whole(self) -> bool:
        """Whether the manifest names what was read, and nothing else."""
        return self.has_manifest and set(self._named) == self.loaded.keys()

    def look(self) -> list[str]:
        """Reads the manifest and lists the folder; the names of shards that were not read yet.

        Raises:
            RefLogpsError: the store is of another reference.
            DataError: it is none, or of another version.
        """
        try:
            names = sorted(filter(shards.KIND.is_data, os.listdir(self.folder)))  # noqa: PTH208
        except FileNotFoundError:
            names = []
        manifest = self._manifest(bool(names))
        self.has_manifest = manifest is not None
        self._named = self._checked(manifest) if manifest is not None else []
        # What somebody took away or wrote to is not there: all is read anew.
        if any(self._status(name) != status for name, (_, _, status) in self.loaded.items()):
            self.forget()
        self.lost = set(self._named) - set(names)
        for gone in (self.damaged.keys() | self.foreign.keys()) - set(names):
            self.damaged.pop(gone, None)
            self.foreign.pop(gone, None)
        return [name for name in names if name not in self.loaded and name not in self.foreign]

    def forget(self) -> None:
        """Nothing was read."""
        self.loaded.clear()
        self.with_tokens.clear()

    def rows_of(self, names: list[str]) -> int:
        """As many rows as there are in shards that were not read yet, or a few more."""
        rows = 0
        for name in names:
            with suppress(OSError):
                size = (self.folder / name).stat().st_size
                rows += min(shards.ROWS, size // shards.ROW_BYTES)
        return rows

    def read(self, names: list[str]) -> Iterator[shards.Shard]:
        """The shards of this reference among ``names``; the others are noted.

        Raises:
            RefLogpsError: there is no manifest, and all shards are of another reference.
        """
        ours = self.fingerprint.digest
        for name in names:
            status = self._status(name)
            if status is None or self.damaged.get(name) == status:
                continue
            try:
                shard = shards.read(self.folder, name)
            except FileNotFoundError:
                continue
            except DataError:
                self.damaged[name] = status
                continue
            self.damaged.pop(name, None)
            if shard.reference != ours:
                self.foreign[name] = shard.reference
                continue
            yield shard
            self.loaded[name] = (len(shard.logps), shard.size, status)
            if shard.has_tokens:
                self.with_tokens.add(name)
        if self.foreign and not self.loaded and not self.has_manifest:
            other = next(iter(self.foreign.values()))
            raise RefLogpsError(
                f"{self.folder}: the log-probs are of another reference: fingerprint "
                f"{other[:12]}, expected {ours[:12]}; which parts differ stood in the manifest, "
                "which is gone\nhint: choose a new folder"
            )

    def manifest(self) -> bytes:
        """The manifest of what was read.

        Raises:
            RefLogpsError: it would be too long to be read again.
        """
        text = sealed(
            {
                "format": FORMAT,
                "version": VERSION,
                "package": _core.__version__,
                "fingerprint": {
                    **self.fingerprint.to_dict(),
                    # Who reads otherwise than the first writer wrote is always warned.
                    "soft": {**self.fingerprint.soft, **self._soft},
                },
                "shards": [[name, *self.loaded[name][:2]] for name in sorted(self.loaded)],
            }
        )
        if len(text) > MAX_MANIFEST_BYTES:
            raise RefLogpsError(
                f"{self.folder}: {len(self.loaded)} shards are more than a manifest holds\n"
                "hint: put more pairs at once, into a new folder"
            )
        return text

    def _status(self, name: str) -> tuple[int, ...] | None:
        """What tells that a shard is another or was written to; None if it is gone."""
        try:
            found = (self.folder / name).lstat()
        except OSError:
            return None
        return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def _manifest(self, has_shards: bool) -> dict[str, Any] | None:
        self.notes = []
        try:
            return unsealed(self.folder, FORMAT, VERSION, "compute the log-probs again")
        except FileNotFoundError:
            if has_shards:
                self.notes = ["there was no manifest; the shards were found without it"]
        except DataError as error:
            if _is_sealed(self.folder) or not has_shards:
                raise
            self.notes = [f"{str(error).partition(chr(10))[0]}; the shards were found without it"]
        return None

    def _checked(self, manifest: dict[str, Any]) -> list[str]:
        """The names of the shards in a manifest of this reference."""
        try:
            stored = Fingerprint.of(Fingerprint(**manifest["fingerprint"]))
            names = [str(name) for name, _, _ in manifest["shards"]]
        except (KeyError, TypeError, ValueError) as error:
            what = f"the manifest is damaged: {type(error).__name__}"
            raise damaged(self.folder / MANIFEST, what) from error
        if different := self.fingerprint.differences(stored):
            raise RefLogpsError(
                f"{self.folder}: the stored log-probs are of another reference\n  "
                + "\n  ".join(different[:SHOWN])
                + (f"\n  {len(different) - SHOWN} more" if len(different) > SHOWN else "")
                + "\nhint: choose a new folder for this reference"
            )
        self._soft, self.soft = stored.soft, self.fingerprint.soft_differences(stored)
        return names


def _is_sealed(folder: Path) -> bool:
    """Whether the manifest is whole, of whatever format."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and is_sound(manifest)
