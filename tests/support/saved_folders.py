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


def flips_seen(path, bit_of, refuses):
    """For each byte of a file, whether a flip of one bit of it is seen; the file is left as it was."""
    good = path.read_bytes()
    seen = []
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << bit_of(at)
        path.write_bytes(bad)
        seen.append(refuses())
    path.write_bytes(good)
    return seen
