"""What a user installs: the import stays light, the wheel holds the kernels, the stubs and the licences."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from places import ROOT

pytestmark = pytest.mark.slow


def run(*command, **options):
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_import_loads_numpy_and_nothing_else_of_weight():
    code = (
        "import sys, numpy; before = {m.partition('.')[0] for m in sys.modules}; import dpo_ext; "
        "after = {m.partition('.')[0] for m in sys.modules}; "
        "print(*sorted(after - before - set(sys.stdlib_module_names)))"
    )
    assert run(sys.executable, "-c", code).split() == ["dpo_ext"]


def test_versions_agree():
    import dpo_ext

    cargo = tomllib.loads((ROOT / "Cargo.toml").read_text(encoding="utf-8"))
    assert dpo_ext.__version__ == cargo["package"]["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {dpo_ext.__version__}" in changelog or "## Unreleased" in changelog


def test_every_public_name_has_a_docstring():
    import dpo_ext
    import dpo_ext.torch

    for module in (dpo_ext, dpo_ext.torch):
        for name in module.__all__:
            if name != "__version__":
                assert (getattr(module, name).__doc__ or "").strip(), f"{module.__name__}.{name}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    maturin = Path(sys.executable).with_name("maturin")
    if not maturin.exists() or shutil.which("cargo") is None:
        pytest.skip("maturin and cargo are needed to build a wheel")
    out = tmp_path_factory.mktemp("wheel")
    run(maturin, "build", "--release", "--out", out, cwd=ROOT)
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_kernels_stubs_and_licences(wheel):
    assert re.fullmatch(r"dpo_ext-[\d.]+-cp311-abi3-.*\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for source in (ROOT / "cuda").iterdir():
            assert archive.read(f"dpo_ext/cuda/{source.name}") == source.read_bytes()
    assert {"dpo_ext/py.typed", "dpo_ext/_core.pyi", "dpo_ext/_core.abi3.so"} <= names
    assert {"LICENSE-MIT", "LICENSE-APACHE"} <= {name.rpartition("/")[2] for name in names}
    assert any(name.endswith(".cu") for name in names)


def test_wheel_imports_in_a_clean_environment_with_numpy_alone(wheel, tmp_path):
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
    code = (
        "import dpo_ext; pairs = dpo_ext.PairDataset.from_ids([[1, 2]], [[3]], [[4, 5]]); "
        "batch = pairs.plan(layout='padded', pairs_per_batch=1)[0]; print(batch.input_ids.tolist())"
    )
    assert run(python, "-c", code, cwd=tmp_path).strip() == "[[1, 2, 3, 0], [1, 2, 4, 5]]"
