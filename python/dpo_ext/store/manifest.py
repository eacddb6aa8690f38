"""The manifest of a saved data set: JSON that carries its own digest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_ext.store.folder import MANIFEST, PAIRS, damaged, open_inside

# The name is that of the first release, which had pairs alone; `kind` says of what it is.
FORMAT = "dpo_ext pairs"
VERSION = 1
MAX_MANIFEST_BYTES = 16 << 20
ROW = "row"
# Of the metadata of a schema of ids: their `pad_id` and `vocab_size`, as JSON.
FACTS_KEY = "dpo_ext"


def sealed(manifest: dict[str, Any]) -> bytes:
    """JSON that carries its own digest."""
    manifest = {**manifest, "checksum": _checksum(manifest)}
    return (json.dumps(manifest, indent=1) + "\n").encode()


def _checksum(manifest: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in manifest.items() if k != "checksum"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def current_file(folder: Path) -> str | None:
    """The data file that the manifest of a folder names, so that no sweep takes it away.

    Raises:
        DataError: the manifest is not one of ours.
    """
    try:
        manifest = read_manifest(folder)
    except FileNotFoundError:
        return None
    return manifest["file"]["name"]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a saved data set, checked.

    Raises:
        FileNotFoundError: there is none.  DataError: it is damaged, of another format or newer.
    """
    manifest = unsealed(folder, FORMAT, VERSION, "save the data set again")
    file_ = manifest.get("file")
    name = file_.get("name") if isinstance(file_, dict) else None
    if not isinstance(name, str) or not PAIRS.is_data(name):
        raise damaged(folder / MANIFEST, "`file`: expected 32 hexadecimal digits and .arrow")
    return manifest


def unsealed(folder: Path, format_: str, version: int, again: str) -> dict[str, Any]:
    """A manifest that :func:`sealed` made.

    Args:
        format_, version: what it must say of itself.
        again: what to do where it is of another version, for the hint.

    Raises:
        FileNotFoundError: there is none.  DataError: it is damaged, of another format or newer.
    """
    path = folder / MANIFEST
    fd = open_inside(folder, MANIFEST)
    with os.fdopen(fd, "rb") as file:
        text = file.read(MAX_MANIFEST_BYTES + 1)
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"the manifest is damaged: {type(error).__name__}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != format_:
        raise damaged(path, f"expected the format {format_!r}")
    found = manifest.get("version")
    if type(found) is not int or found != version:
        package = str(manifest.get("package"))[:20]
        raise damaged(
            path,
            f"expected version {version} of the format, found {str(found)[:20]}, written by "
            f"dpo_ext {package!a}\nhint: load it with that version, or {again}",
        )
    if not is_sound(manifest):
        raise damaged(path, "the manifest is damaged: its checksum differs")
    return manifest


def is_sound(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest is as it was sealed."""
    try:
        return manifest["checksum"] == _checksum(manifest)
    except (KeyError, ValueError, RecursionError):
        return False
