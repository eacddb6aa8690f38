"""The cache of `from_files(cache_dir=)`: a saved data set for everything that its ids depend on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from dpo_ext import _core
from dpo_ext.data.encode import Job, encode_into
from dpo_ext.data.nothing import check_pairs
from dpo_ext.data.options import Limits, Settings
from dpo_ext.data.templates import HIDDEN_CLOCK
from dpo_ext.errors import DataError
from dpo_ext.extras import arrow
from dpo_ext.report import Report
from dpo_ext.store.folder import SHADOW, digest_of, locks, typed_errors, writing
from dpo_ext.store.manifest import VERSION, read_manifest
from dpo_ext.store.notes import noted, status_of
from dpo_ext.store.read import Saved, opened

# Of these options the ids do not depend, or only where `_now` and `_limits_allow` say so.
APART = ("threads", "now", "limits")
_CLOCK = "strftime_now"
# Where a template asks only whether there is a clock, and where it says a format.
_ASKED = re.compile(rf"\b{_CLOCK}\s+is\s+(?:not\s+)?defined\b")
_FORMATS = re.compile(rf"""\b{_CLOCK}\s*\(\s*(?:"([^"\\]*)"|'([^'\\]*)')\s*\)""")


def cached(job: Job, cache_dir: str | os.PathLike[str]) -> Saved:
    """The examples of files, mapped from a cache that is filled first if need be.

    What was encoded counts for the same bytes in files of the same endings, the same tokenizer,
    templates and options; for ``strftime_now`` in any of them, the same time as far as it shows.
    It counts whatever the folder of the files, ``threads``, and those limits that dropped no row.
    """
    arrow("`cache_dir`")
    saved = _cached(replace(job, notes=()), Path(cache_dir))
    # How the files were found is not of their contents.
    report = saved.examples.report
    saved.examples.report = replace(report, notes=(*job.notes, *report.notes))
    return saved


def _cached(job: Job, root: Path) -> Saved:
    locks(root)
    with typed_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        before = [status_of(name) for name in job.files]
        prints = [fingerprint(root, name) for name in job.files]
    facts = _facts(job, prints)
    limits = asdict(job.settings.limits)
    folders = [root / _key(facts), root / _key({**facts, "limits": limits})]
    damage = None
    for folder in folders:
        found, said = _look(folder, job)
        if found is not None:
            return found
        damage = said or damage
    # The first name is for the first limits that come; others get a name of their own.
    folder = folders[1] if _is_sound(folders[0]) else folders[0]

    def unchanged(report: Report) -> None:
        check_pairs(job.files, report, unpaired=job.settings.is_unpaired)
        for name, status in zip(job.files, before, strict=True):
            if status_of(name) != status:
                raise DataError(
                    f"{name}: the file changed while it was read", path=name, reason="bad_input"
                )

    with writing(folder) as opened_folder:
        found, _ = _look(folder, job)
        if found is not None:  # by another process, while this one waited
            return found
        opened_folder.sweep(None)
        made = {"limits": limits, "sources": list(job.files)}
        encode_into(opened_folder, job, made, unchanged)
    saved = opened(folder, verify=False, kind=job.kind)
    if damage is not None:
        note = f"what the cache held was damaged and was encoded anew: {damage}"
        report = saved.examples.report
        saved.examples.report = replace(report, notes=(*report.notes, note))
    return saved


def _look(folder: Path, job: Job) -> tuple[Saved | None, str | None]:
    """What a folder of the cache holds for these limits, and what was wrong with it."""
    try:
        saved = opened(folder, verify=True, kind=job.kind)
    except FileNotFoundError:
        return None, None
    except DataError as error:
        return None, str(error).splitlines()[0]
    made, examples = saved.manifest["made"], saved.examples
    if not _limits_allow(made["limits"], job.settings.limits, examples.report):
        return None, None
    # The same files may have other names by now.
    names = dict(zip(made["sources"], job.files, strict=True))
    first = {
        reason: replace(example, path=names.get(example.path, example.path))
        for reason, example in examples.report.first.items()
    }
    examples.report = replace(examples.report, first=first)
    return saved, None


def _is_sound(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except (FileNotFoundError, DataError):
        return False
    return True


def _limits_allow(made: Mapping[str, Any], limits: Limits, report: Report) -> bool:
    """Whether rows encoded under ``made`` come out the same under ``limits``."""
    wanted = asdict(limits)
    if made == wanted:
        return True
    infinite = float("inf")
    wider = all(
        (infinite if wanted[name] is None else wanted[name])
        >= (infinite if made.get(name, 0) is None else made.get(name, 0))
        for name in wanted
    )
    return wider and "limit" not in report.dropped


def _facts(job: Job, prints: Sequence[str]) -> dict[str, Any]:
    """All that ids depend on."""
    state = job.tokenizer.__reduce__()[1][0]
    return {
        "format": VERSION,
        "package": _core.__version__,
        "tokenizer": hashlib.sha256(state).hexdigest(),
        "now": _now(job.tokenizer.chat_templates, job.settings.now),
        "files": [
            ["".join(Path(name).suffixes[-2:]).lower(), print_]
            for name, print_ in zip(job.files, prints, strict=True)
        ],
        "options": {
            f.name: getattr(job.settings, f.name) for f in fields(Settings) if f.name not in APART
        },
    }


def _key(facts: Mapping[str, Any]) -> str:
    text = json.dumps(facts, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _now(templates: Iterable[str], now: Sequence[int]) -> list[Any]:
    """The time as far as templates show it: all of it, unless all their formats can be read."""
    moment = time.struct_time((*now, -1))
    shown: list[Any] = []
    for template in templates:
        text = _ASKED.sub("", template)
        formats = _FORMATS.findall(text)
        if text.count(_CLOCK) != len(formats) or HIDDEN_CLOCK in text:
            return list(now)
        shown += [time.strftime(double or single, moment) for double, single in formats]
    return shown


def fingerprint(root: Path, name: str) -> str:
    """The digest of what a file holds, or a folder; read once while the file stays as it is."""
    path = Path(name)
    if path.is_dir():
        inner = sorted(part for part in path.iterdir() if part.name != SHADOW)
        parts = [[part.name, fingerprint(root, str(part))] for part in inner]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return noted(root / ".files", name, digest_of)
