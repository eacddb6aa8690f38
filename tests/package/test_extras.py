"""What an extra brings is declared in pyproject.toml and said in one file, and its lower bounds are what is tested."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import lower_bounds
import pytest

from dpo_ext import extras

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DECLARED = PROJECT["optional-dependencies"]
# Groups that no message names: the CUDA ones go by the version of CUDA, the last two are for work on this repository.
CUDA, OURS = {"cuda12", "cuda13"}, {"test", "dev"}


def packages(extra: str) -> set[str]:
    return {re.match(r"[\w-]+", line)[0] for line in DECLARED[extra]}


def test_every_module_is_in_the_extra_that_its_message_names():
    for module, extra in extras.EXTRAS.items():
        assert module in packages(extra), f"{module} is not in the extra {extra}"


def test_every_package_of_an_extra_can_be_named_with_an_extra_that_brings_it():
    for extra in set(DECLARED) - CUDA - OURS - {"all"}:
        for package in packages(extra):
            named = extras.extra_of(package)
            assert named is not None, f"{package} of the extra {extra} is not in extras.py"
            assert package in packages(named)


def test_the_cuda_extras_bring_the_cupy_that_is_named():
    for extra in CUDA:
        command = extras.cupy(extra.removeprefix("cuda"))
        assert command == f"pip install cupy-{extra}x, or dpo_ext[{extra}]"
        assert f"cupy-{extra}x" in packages(extra)


def test_all_is_every_extra_that_runs_on_any_machine():
    (itself,) = DECLARED["all"]
    named = re.fullmatch(r"dpo_ext\[(.*)\]", itself)[1].split(",")
    assert sorted(named) == sorted(set(DECLARED) - CUDA - OURS - {"all"})


def test_make_setup_builds_with_every_extra_and_asks_no_index_for_this_package():
    # maturin hands each requirement to pip, where `dpo_ext[...]` is a package that no index has.
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    built = re.search(r"^EXTRAS := (.*)$", makefile, re.MULTILINE)[1].split(",")
    assert sorted(built) == sorted(set(DECLARED) - (CUDA - {"cuda13"}) - {"all"})
    assert not [line for extra in built for line in DECLARED[extra] if "dpo_ext" in line]


def test_no_other_file_says_what_to_install():
    package = ROOT / "python" / "dpo_ext"
    saying = [
        str(path.relative_to(package))
        for path in sorted(package.rglob("*.py"))
        if "pip install" in path.read_text(encoding="utf-8")
    ]
    assert saying == ["extras.py"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statement", "missing", "extra"),
    [
        ("import dpo_ext.torch", "torch", "torch"),
        ("import dpo_ext.trl", "trl", "trl"),
        ("import dpo_ext.testing", "torch", "torch"),
        ("import dpo_ext.demo", "transformers", "hf"),
        ("import dpo_ext.testing.search as search; search.hypothesis()", "hypothesis", "testing"),
        ("from dpo_ext.preference import kl_divergence as f; f(1, 1)", "torch", "torch"),
        ("from dpo_ext.preference import reward_loss as f; f(1, 1)", "torch", "torch"),
        (
            "import dpo_ext; p = dpo_ext.PairDataset.from_ids([[1]], [[2]], [[3]]); p.save('never')",
            "pyarrow",
            "arrow",
        ),
        (
            "import dpo_ext; p = dpo_ext.PairDataset.from_ids([[1]], [[2]], [[3]]); "
            "p.plan(layout='padded', pairs_per_batch=1)[0].to('cpu')",
            "torch",
            "torch",
        ),
    ],
)
def test_what_is_missing_is_named_with_its_extra(statement, missing, extra, tmp_path):
    # An empty torch is enough where something else is missing, and starts in no time.
    torch = "" if missing == "hypothesis" else "sys.modules['torch'] = types.ModuleType('torch')\n"
    code = f"import sys, types\n{torch}sys.modules[{missing!r}] = None\n{statement}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    said = f'needs {missing}\nhint: pip install "dpo_ext[{extra}]"\n'
    assert done.returncode == 1
    assert done.stderr.endswith(said), done.stderr


def test_what_an_installed_package_lacks_itself_is_not_blamed_on_an_extra(tmp_path, monkeypatch):
    (tmp_path / "typer.py").write_text("import not_there_either\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "typer", raising=False)
    with pytest.raises(ModuleNotFoundError, match="not_there_either"):
        extras.need("typer", "the test")


def test_every_requirement_has_one_lower_bound():
    bounds = lower_bounds.lower_bounds(PROJECT)
    named = {re.match(r"[\w-]+", line)[0] for line in lower_bounds.requirements(PROJECT)}
    assert set(bounds) == named


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": ["torch"]}, "'torch': expected a name and a lower bound"),
        ({"a": ["torch<3"]}, "'torch<3': expected a name and a lower bound"),
        ({"a": ["rich>=13"], "b": ["rich>=14"]}, "rich: expected one lower bound, found 13 and 14"),
    ],
)
def test_a_requirement_without_a_lower_bound_of_its_own_is_refused(groups, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        lower_bounds.lower_bounds({"dependencies": [], "optional-dependencies": groups})
