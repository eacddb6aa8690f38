"""`dpo-ext doctor`: what works here, what does not, and what to do about it.

Everything is tried, nothing is taken from a version alone: kernels stand beside float64, attention
sees a packed row. A finding that is broken, or asked for and missing, makes the verdict.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from dpo_ext.cli.versions import MISSING, cpu_kernels, cuda_devices, version_lines
from dpo_ext.errors import DataError, DpoExtError
from dpo_ext.extras import install

State = Literal["works", "missing", "broken", "note"]
MARKS: dict[State, str] = {"works": "ok", "missing": "-", "broken": "BROKEN", "note": "note"}
CGROUP = Path("/sys/fs/cgroup")
SHARED_MEMORY = Path("/dev/shm")
SMALL_SHM = 1 << 30
"""Docker gives 64 MB, which the batches of a few DataLoader workers fill."""
NOT_OURS = ("all", "dev", "test", "cuda12", "cuda13")
"""Extras that users do not ask for by what they do; CUDA's is looked at as `cuda`."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    ``need`` is what somebody asks for by ``--need``: an extra, ``cpu``, ``cuda`` or ``packing``.
    """

    name: str
    need: str
    state: State
    said: str
    hint: str | None = None


def examine(needs: Sequence[str] = ()) -> dict[str, Any]:
    """Looks at everything, prints it, and returns what ``--json`` writes; ``"works"`` is the
    verdict.

    Raises:
        DataError: a need that there is not.
    """
    known = ("cpu", "cuda", "packing", *_extras())
    for name in needs:
        if name not in known:
            raise DataError(f"unknown need `{name}`\nhint: there is {', '.join(known)}")
    versions = version_lines()
    print("\n".join(versions), end="\n\n")
    findings = []
    for look in LOOKS:
        for finding in _found(look):
            findings.append(finding)
            print(_line(finding))
    wrong = [
        f for f in findings if f.state == "broken" or (f.state == "missing" and f.need in needs)
    ]
    print()
    print(*_verdict(findings, wrong, needs), sep="\n")
    return {
        "versions": versions,
        "findings": [asdict(finding) for finding in findings],
        "needs": list(needs),
        "works": not wrong,
    }


def _found(look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What a look finds, or that it cannot look, as where a package breaks when it is imported."""
    try:
        yield from look()
    except Exception as error:
        name = look.__name__.strip("_")
        need = name if name in ("cpu", "cuda", "packing") else "cpu"
        said = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        hint = "install it again, or what it names"
        yield Finding(name, need, "broken", said, hint)


def _line(finding: Finding) -> str:
    hint = f"\n{'':<34}{finding.hint}" if finding.hint and finding.state != "works" else ""
    return f"{MARKS[finding.state]:<8}{finding.name:<26}{finding.said}{hint}"


def _verdict(
    findings: Sequence[Finding], wrong: Sequence[Finding], needs: Sequence[str]
) -> Iterator[str]:
    if wrong:
        yield f"does not work: {', '.join(f.name for f in wrong)}"
        for finding in wrong:
            yield f"  {finding.name}: {finding.hint or finding.said}"
        return
    asked = f"; {', '.join(needs)} among it, as asked" if needs else ""
    missing = [f.name for f in findings if f.state == "missing"]
    rest = f"; not there: {', '.join(missing)}" if missing else ""
    yield f"fine: what is installed works{asked}{rest}"


# ---- the processor and its memory ----------------------------------


def _cpu() -> Iterator[Finding]:
    sets = cpu_kernels()
    if _version("torch") is None:
        yield Finding("CPU kernels", "cpu", "missing", f"{sets}; not run", _install_hint("torch"))
        return
    yield _tried_kernels("CPU kernels", "cpu", f"{sets}; ")


def _tried_kernels(name: str, device: str, before: str) -> Finding:
    """Every kernel in every dtype beside float64."""
    from dpo_ext.torch.probes import try_kernels

    trials = try_kernels(device)
    wrong = [trial for trial in trials if trial.error > 1]
    if not wrong:
        dtypes = ", ".join(trial.dtype for trial in trials)
        return Finding(name, device, "works", f"{before}as float64 in {dtypes}")
    worst = "; ".join(f"{t.dtype}: {t.error:.3g} x what is allowed ({t.where})" for t in wrong)
    hint = 'report it with this page; impl="torch" computes without kernels until then'
    return Finding(name, device, "broken", f"{before}{worst}", hint)


def _threads() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = cpu_quota()
    said = f"{cores} cores" + ("" if quota is None else f", {quota:g} by the cgroup")
    variables = [n for n in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS") if os.environ.get(n)]
    said += "".join(f", {name}={os.environ[name]}" for name in variables)
    if _version("torch") is None:
        yield Finding("threads", "cpu", "note", said)
        return
    import torch

    threads, allowed = torch.get_num_threads(), min(cores or 1, quota or cores or 1)
    said += f"; torch uses {threads}"
    if threads > max(allowed, 1):
        hint = (
            f"more threads than cores wait for each other: OMP_NUM_THREADS={max(int(allowed), 1)}"
        )
        yield Finding("threads", "cpu", "note", said, hint)
    else:
        yield Finding("threads", "cpu", "works", said)


def cpu_quota(root: Path = CGROUP) -> float | None:
    """Cores' worth of time that the cgroup allows, or None for any."""
    for folder in _cgroups(root):
        found = _numbers(folder / "cpu.max")
        if len(found) == 2 and found[1]:
            return found[0] / found[1]
    v1 = [_numbers(root / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
    if all(v1) and v1[0][0] > 0 and v1[1][0] > 0:
        return v1[0][0] / v1[1][0]
    return None


def memory_limit(root: Path = CGROUP) -> int | None:
    """Bytes that the cgroup allows, or None for all there are."""
    for folder in _cgroups(root):
        if found := _numbers(folder / "memory.max"):
            return found[0]
    found = _numbers(root / "memory" / "memory.limit_in_bytes")
    return found[0] if found and found[0] < 1 << 60 else None  # what stands for none is near 2^63


def _cgroups(root: Path) -> Iterator[Path]:
    """This process's group and those above it."""
    try:
        text = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    except OSError:
        text = ""
    own = next((line[3:] for line in text.splitlines() if line.startswith("0::")), "/")
    folder = root / own.lstrip("/")
    yield folder
    while folder != root and root in folder.parents:
        folder = folder.parent
        yield folder


def _numbers(path: Path) -> list[int]:
    """The numbers of a file of a cgroup; none where it says ``max`` or is not there."""
    try:
        words = path.read_text(encoding="utf-8").split()
    except OSError:
        return []
    return [int(word) for word in words] if all(w.lstrip("-").isdigit() for w in words) else []


def _memory() -> Iterator[Finding]:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return
    limit = memory_limit()
    said = f"{total / 2**30:.1f} GiB" + (
        "" if limit is None or limit >= total else f", {limit / 2**30:.1f} by the cgroup"
    )
    state: State = "works"
    hint = None
    try:
        shm = os.statvfs(SHARED_MEMORY)
    except OSError:
        pass
    else:
        size = shm.f_frsize * shm.f_blocks
        said += f"; {SHARED_MEMORY} {size / 2**30:.2f} GiB"
        if size < SMALL_SHM:
            state = "note"
            hint = "DataLoader workers hand batches over in it: `docker run --shm-size=8g`"
    yield Finding("memory", "cpu", state, said, hint)


# ---- packages ------------------------------------------------------


def _extras() -> tuple[str, ...]:
    """The extras of this package, as its metadata has them."""
    try:
        found = metadata.metadata("dpo_ext").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:  # run from its folder
        return ("torch", "arrow", "hf", "trl", "lightning", "cli", "testing")
    return tuple(extra for extra in found if extra not in NOT_OURS)


def _optional() -> Iterator[Finding]:
    """Each extra: whether its packages are there, as new as they must be."""
    for extra in _extras():
        wanted = list(_requirements(extra))
        found = {name: _version(name) for name, _ in wanted}
        absent = [name for name, version in found.items() if version is None]
        said = ", ".join(f"{name} {version or MISSING}" for name, version in found.items())
        wrong = [
            f"{name} must be {bounds}"
            for name, bounds in wanted
            if found[name] is not None and not _within(found[name], bounds)
        ]
        if wrong:
            yield Finding(
                f"extra {extra}",
                extra,
                "broken",
                f"{said}: {'; '.join(wrong)}",
                f"{install(extra)} takes versions that are",
            )
        elif absent:
            yield Finding(f"extra {extra}", extra, "missing", said, _install_hint(extra))
        else:
            yield Finding(f"extra {extra}", extra, "works", said)


def _install_hint(extra: str) -> str:
    first = "the build of torch that fits this machine, then " if extra == "torch" else ""
    return f"{first}{install(extra)}"


def _requirements(extra: str) -> Iterator[tuple[str, str]]:
    """Name and bounds of each package that an extra asks for."""
    try:
        required = metadata.requires("dpo_ext") or []
    except metadata.PackageNotFoundError:
        return
    for text in required:
        requirement, _, marker = text.partition(";")
        if re.search(rf"extra\s*==\s*['\"]{re.escape(extra)}['\"]", marker):
            name = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
            if name is not None:
                yield name[0], requirement.strip()[name.end() :].strip()


def _within(version: str | None, bounds: str) -> bool:
    """Whether a version is within bounds; True where `packaging`, which transformers brings, is
    not there to tell.
    """
    try:
        from packaging.specifiers import SpecifierSet
    except ModuleNotFoundError:
        return True
    return SpecifierSet(bounds).contains(version or "", prereleases=True)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# ---- the GPU, and attention ----------------------------------------


def _cuda() -> Iterator[Finding]:
    devices = cuda_devices()
    if isinstance(devices, str):
        hint = "the CUDA kernels need an NVIDIA GPU and its driver; the CPU kernels need nothing"
        yield Finding("CUDA kernels", "cuda", "missing", devices, hint)
        return
    names = ", ".join(devices)
    if _version("torch") is None:
        yield Finding("CUDA kernels", "cuda", "missing", names, _install_hint("torch"))
        return
    from dpo_ext.torch.logps import cuda

    try:
        cuda.require()
        finding = _tried_kernels("CUDA kernels", "cuda", f"{names}; {_of_device()}; ")
    except DpoExtError as error:
        said, _, hint = str(error).partition("\nhint: ")
        missing = "cannot be imported" in said
        state: State = "missing" if missing else "broken"
        finding = Finding("CUDA kernels", "cuda", state, f"{names}: {said}", hint or None)
    yield finding


def _of_device() -> str:
    import torch

    properties = torch.cuda.get_device_properties(0)
    arch = f"sm_{properties.major}{properties.minor}"
    return f"{arch}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda} of torch"


def _packing() -> Iterator[Finding]:
    if _version("torch") is None or _version("transformers") is None:
        yield Finding(
            "packed rows", "packing", "missing", "not tried: no transformers", _install_hint("hf")
        )
        return
    import torch

    from dpo_ext.torch.probes import try_attention

    for one in try_attention("cuda" if torch.cuda.is_available() else "cpu"):
        optional = one.name.startswith("flash") and not one.works
        ours = one.name.startswith("dpo_ext")
        state: State = "works" if one.works else "note" if optional or not ours else "broken"
        hint = None if one.works else f'layout="padded" with attn_implementation="{one.name}"'
        yield Finding(f"packed: {one.name}", "packing", state, one.said, hint)


LOOKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _cpu, _threads, _memory, _optional, _cuda, _packing,
)  # fmt: skip
