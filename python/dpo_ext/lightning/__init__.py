"""Lightning with the data path, the log-probs and the losses of dpo_ext inside.

`PairDataModule` gives the batches, `DPOModule` trains your model on them, in a Trainer of yours.
"""

from dpo_ext.extras import need

need("torch", "dpo_ext.lightning")

from dpo_ext.lightning.datamodule import PairDataModule
from dpo_ext.lightning.module import DPOModule

__all__ = ["DPOModule", "PairDataModule"]
