"""`patch("trl")` in every unpacked version of TRL, a process each, with the transformers that is here.

A version whose modules do not import beside that transformers is skipped with the reason.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import wheels
from places import ROOT, child_path

pytestmark = pytest.mark.slow

CHILD = """
import importlib, json, sys, types, warnings
warnings.simplefilter("ignore")
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

# Packages that a trainer imports at its head and that are not needed to look at its names.
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("requests", "joblib", "llm_blender", "mergekit", "weave"):
            return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        class Fake(types.ModuleType):
            def __getattr__(self, key):
                if key.startswith("__"):
                    raise AttributeError(key)
                return MagicMock()
        return Fake(spec.name)

    def exec_module(self, module):
        module.__path__ = []

sys.meta_path.append(Absent())
try:
    import trl.trainer.utils as utils
except Exception as error:
    print(json.dumps({"unusable": f"{type(error).__name__}: {error}"[:200]}))
    sys.exit()
imported, failed = [], {}
for name in ("dpo", "grpo", "rloo", "kto", "cpo", "orpo", "bco", "online_dpo", "nash_md", "xpo", "ppo"):
    for module in (f"trl.experimental.{name}.{name}_trainer", f"trl.trainer.{name}_trainer"):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if module.startswith(error.name or "?"):
                continue
            failed[module] = str(error)[:80]
        except Exception as error:
            failed[module] = f"{type(error).__name__}: {error}"[:80]
        else:
            imported.append(module)
            break

NAMES = ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy",
         "_ChunkedLogProbFunction")

def held():
    return {
        f"{module}.{name}": id(value)
        for module, m in list(sys.modules.items())
        if module.split(".")[0] == "trl" and isinstance(m, types.ModuleType)
        for name, value in list(vars(m).items())
        if name in NAMES and value is not None and not module.startswith("trl.kernels")
    }

before = held()
from dpo_ext.compat import patch
with patch("trl") as done:
    during = held()
    import torch
    logits = torch.randn(2, 3, 7)
    index = torch.tensor([[1, 2, 3], [4, 5, 6]])
    got = utils.selective_log_softmax(logits, index)
after = held()
want = utils.selective_log_softmax(logits, index)
print(json.dumps({
    "version": sys.modules["trl"].__version__,
    "swapped": done.swapped,
    "left": done.left,
    "kept": [name for name in before if before[name] == during.get(name)],
    "restored": before == after or {n: after.get(n) for n in before} == before,
    "close": bool(torch.allclose(got, want, atol=1e-5)),
    "imported": imported,
    "failed": failed,
}))
"""


@pytest.mark.parametrize(
    "wheel",
    wheels.wheels("trl") or [pytest.param(None, marks=pytest.mark.skip(reason=wheels.NO_PEERS))],
    ids=str,
)
def test_every_name_of_this_version_is_swapped_and_put_back(wheel, record_property):
    paths = [str(wheel.path), str(ROOT / "python"), child_path()]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRL_EXPERIMENTAL_SILENCE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", CHILD], env=env, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    if "unusable" in found:
        pytest.skip(f"TRL {wheel.version} does not import here: {found['unusable']}")
    print(json.dumps(found))
    assert found["version"].startswith(wheel.version)
    assert found["kept"] == []
    assert found["restored"]
    assert found["close"]
    assert all("importing" in why for _, why in found["left"]), found["left"]
    assert "trl.trainer.utils.selective_log_softmax" in found["swapped"]
