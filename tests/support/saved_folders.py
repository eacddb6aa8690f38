"""The inside of a saved data set, and manifests that lie."""

import json

from dpo_ext.store import manifest as manifests


def data_file(path):
    return next(path.glob("*.arrow"))


def manifest_of(path):
    return json.loads((path / "manifest.json").read_text())


def forge(path, change):
    """The manifest with a change and the right checksum: what only malice makes."""
    manifest = manifest_of(path)
    change(manifest)
    del manifest["checksum"]
    (path / "manifest.json").write_bytes(manifests.sealed(manifest))
