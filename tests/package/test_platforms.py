"""Windows and macOS, by taking away what Python lacks there; the workflows build and start the real ones."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SUPPORT = Path(__file__).resolve().parents[1] / "support"

# https://docs.python.org/3/library says of each of these where it exists. torch comes first: it is built for one system.
WINDOWS = """
import mmap, os, sys
{torch}
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "pread", "sched_getaffinity", "fchmod", "geteuid"):
    delattr(os, name)
for name in [name for name in vars(mmap) if name.startswith(("MADV_", "MAP_", "PROT_"))]:
    delattr(mmap, name)
sys.path.append({support!r})
"""
MADE = """
import pathlib, byte_tokenizer, tiny
from dpo_ext import DataError, PairDataset
tokenizer = byte_tokenizer.tokenizer(pathlib.Path({folder!r}, "model"))
path = tiny.write_jsonl(pathlib.Path({folder!r}, "pairs.jsonl"), tiny.rows(4))
pairs = PairDataset.from_files(str(path), tokenizer)
"""


def run(code: str, folder: Path, *, torch: bool = False) -> str:
    before = WINDOWS.format(torch="import torch" if torch else "", support=str(SUPPORT))
    made = MADE.format(folder=str(folder))
    done = subprocess.run(
        [sys.executable, "-c", before + made + textwrap.dedent(code)],
        capture_output=True, text=True, check=False, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_files_become_batches_without_what_only_posix_has(tmp_path):
    code = "print(len(pairs), pairs.plan(layout='packed', tokens_per_batch=4096)[0].n_pairs)"
    assert run(code, tmp_path) == "4 4\n"


@pytest.mark.slow
def test_log_probs_and_their_gradient_need_nothing_that_only_posix_has(tmp_path):
    code = """
    from dpo_ext.torch import preference_loss, sequence_logps
    batch = pairs.plan(layout="padded", pairs_per_batch=4)[0].to("cpu")
    logits = torch.randn(*batch.input_ids.shape, 40_000, requires_grad=True)
    logps = sequence_logps(logits, batch.table)
    preference_loss(logps, torch.zeros_like(logps)).loss.backward()
    print(logits.grad.isfinite().all().item())
    """
    assert run(code, tmp_path, torch=True) == "True\n"


@pytest.mark.slow
def test_what_needs_file_locks_says_so_where_there_are_none(tmp_path):
    code = """
    from dpo_ext.data.prepare import prepare
    calls = {
        "save": lambda: pairs.save("out"),
        "load": lambda: PairDataset.load("."),
        "cache": lambda: PairDataset.from_files(str(path), tokenizer, cache_dir="out"),
        "prepare": lambda: prepare(str(path), tokenizer, "out"),
    }
    for name, call in calls.items():
        try:
            call()
        except DataError as error:
            print(name, str(error).partition(": ")[2].partition("\\n")[0], sep=": ")
    """
    needs = "saved data sets and caches need Linux or macOS"
    assert run(code, tmp_path).splitlines() == [
        f"{name}: {needs}" for name in ("save", "load", "cache", "prepare")
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_saved_data_set_is_verified_where_cores_are_not_told(tmp_path):
    code = f"""
    import os, sys
    del os.sched_getaffinity
    sys.path.append({str(SUPPORT)!r})
    {{}}
    pairs.save("out")
    print(len(PairDataset.load("out")))
    """
    code = textwrap.dedent(code).format(MADE.format(folder=str(tmp_path)))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.stdout == "4\n", done.stderr
