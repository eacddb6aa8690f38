"""Every loss of the table with parameters it accepts: golden ones, and arrays of one a pair."""

import json

import places
import torch

from dpo_ext.torch.losses.lists import LISTWISE
from dpo_ext.torch.losses.registry import LOSSES
from dpo_ext.torch.losses.single import UNPAIRED

GOLDEN = json.loads((places.GOLDEN / "golden_losses.json").read_text())
BUILT_IN = sorted(name for name, row in LOSSES.items() if not row.autograd)
COUPLED = [name for name in BUILT_IN if LOSSES[name].couples_batch]
SINGLE = sorted(UNPAIRED)
LISTS = sorted(LISTWISE)
SCORED = [name for name in LISTS if "alpha" in LISTWISE[name].parameters]
# losses of exponentials are infinite where their value is: how far they must be finite
FINITE_UP_TO = {"fdpo_forward_kl": 60, "fdpo_alpha": 60, "chipo": 20, "alphapo": 60, "bpo_sba": 1e3}
MISSING = {
    "label_smoothing": 0.2, "delta": 0.3, "ld_alpha": 0.5, "tail_w": -1.0, "tail_l": -2.5,
    "ref_tail_w": -1.5, "ref_tail_l": -2.0, "z": 0.7,
}  # fmt: skip


def parameters_of(name):
    """The first golden set of a pair loss, or what it asks for."""
    golden = GOLDEN["losses"].get(name)
    if golden is not None:
        return dict(golden["sets"][0]["params"])
    row = LOSSES[name]
    return {k: MISSING[k] for k, p in row.parameters.items() if p.default is None}


def arrays_of(name, pairs, dtype=torch.float32):
    """Every parameter that may differ from pair to pair as an array, the others as they are."""
    given = parameters_of(name)
    spread = torch.linspace(0.5, 1.0, pairs, dtype=dtype)  # no domain here has a hole below a value
    out = {}
    for key, parameter in LOSSES[name].parameters.items():
        value = given.get(key, parameter.default or 0.125)
        out[key] = value * spread if parameter.per_pair else value
    return out


def batch_of(pairs, dtype=torch.float32, seed=0):
    """``logps, ref_logps`` (N, 2) on a grid that float32 holds, and ``lengths``."""
    generator = torch.Generator().manual_seed(seed)

    def drawn():
        return -torch.randint(1, 64 * 64, (pairs, 2), generator=generator).to(dtype) / 64

    return drawn(), drawn(), torch.randint(1, 33, (pairs, 2), generator=generator)
