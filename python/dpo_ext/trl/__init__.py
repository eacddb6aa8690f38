"""TRL 1.16 with the data path, the log-probs and the losses of dpo_ext inside.

`DPOTrainer`; `PairCollator`, TRL's collator; `HONOURED` and `REFUSED`, what becomes of each option.
"""

from dpo_ext.extras import need

need("torch", "dpo_ext.trl")
need("trl", "dpo_ext.trl")

from dpo_ext.trl.collator import PairCollator
from dpo_ext.trl.options import HONOURED, REFUSED
from dpo_ext.trl.trainer import DPOTrainer

__all__ = ["HONOURED", "REFUSED", "DPOTrainer", "PairCollator"]
