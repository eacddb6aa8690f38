"""What a type checker says of a user's script: nothing, and it knows what a batch is."""

import subprocess
import sys
from pathlib import Path

import pytest
from places import SUPPORT

SCRIPT = SUPPORT / "user_script.py"
pytestmark = pytest.mark.slow


def check(command, script, folder):
    done = subprocess.run(
        [*command, str(script)], capture_output=True, text=True, check=False, cwd=folder
    )
    return done.returncode, done.stdout + done.stderr


def commands(tmp_path):
    """mypy --strict and pyright in strict mode, as a user has them."""
    settings = tmp_path / "pyrightconfig.json"
    settings.write_text('{"typeCheckingMode": "strict", "reportMissingTypeStubs": false}')
    pyright = Path(sys.executable).with_name("basedpyright")
    yield [sys.executable, "-m", "mypy", "--strict", "--ignore-missing-imports"]
    if pyright.exists():
        yield [str(pyright), "--pythonpath", sys.executable, "-p", str(settings)]


def test_a_users_script_is_clean_and_a_wrong_word_is_found(tmp_path):
    pytest.importorskip("mypy")
    text = SCRIPT.read_text(encoding="utf-8")
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(text)
    wrong.write_text(text.replace('layout="packed"', 'layout="pakced"'))
    for command in commands(tmp_path):
        # One at a time, so that neither looks at the other's file.
        wrong_text = wrong.read_text()
        wrong.unlink(missing_ok=True)
        code, said = check(command, right, tmp_path)
        assert code == 0, said
        wrong.write_text(wrong_text)
        code, said = check(command, wrong, tmp_path)
        assert code == 1, said
        assert "pakced" in said or "layout" in said, said
