"""TRL 1.16 with the data path, the log-probs and the losses of dpo_ext inside.

`DPOTrainer`; `PairCollator`, TRL's collator; `HONOURED`, `BY_TRL`, `REFUSED`: what becomes of each
option.

Raises:
    ImportError: TRL is of another version. ``DPO_EXT_ANY_TRL=1`` tries it all the same.
"""

import os
from importlib.metadata import version

from dpo_ext.extras import install_other, need

need("torch", "dpo_ext.trl")
need("trl", "dpo_ext.trl")

_SERVED = "1.16"
_FOUND = version("trl")
if not _FOUND.startswith(f"{_SERVED}.") and os.environ.get("DPO_EXT_ANY_TRL") != "1":
    raise ImportError(
        f"`dpo_ext.trl` is compared with TRL {_SERVED}, found {_FOUND}\n"
        f"hint: {install_other(f'trl~={_SERVED}.0')}, or set DPO_EXT_ANY_TRL=1 to try it all the "
        'same; dpo_ext.compat.patch("trl") serves other versions'
    )

from dpo_ext.trl.collator import PairCollator
from dpo_ext.trl.options import BY_TRL, HONOURED, REFUSED
from dpo_ext.trl.trainer import DPOTrainer

__all__ = ["BY_TRL", "HONOURED", "REFUSED", "DPOTrainer", "PairCollator"]
