"""Property tests for people who write losses, log-prob functions and collators.

Strategies (`pairs`, `texts`, `logits`, `score_tables`, `pair_logps`) draw inputs that break things;
`check_loss_invariants`, `check_unpaired_loss`, `check_list_loss`, `check_logps` and `check_layouts`
hold a function to what it must satisfy, on fixed cases at the ends and on drawn ones, and raise
AssertionError with a counterexample to paste; `bradley_terry_world` is a world whose optimum is
known, which trains a loss and compares. Needs torch and the extra ``testing``::

    from dpo_ext.testing import check_loss_invariants

    def test_my_loss():
        check_loss_invariants(my_loss, only_margin=True, monotone=True)
"""

from dpo_ext.extras import need

need("torch", "dpo_ext.testing")

from dpo_ext.testing.groups import check_list_loss, check_unpaired_loss
from dpo_ext.testing.layouts import PrefixModel, check_layouts
from dpo_ext.testing.logps import check_logps
from dpo_ext.testing.losses import check_loss_invariants
from dpo_ext.testing.strategies import (
    PairLogps,
    logits,
    pair_logps,
    pairs,
    score_tables,
    texts,
)
from dpo_ext.testing.world import BradleyTerryWorld, bradley_terry_world

__all__ = [
    "BradleyTerryWorld",
    "PairLogps",
    "PrefixModel",
    "bradley_terry_world",
    "check_layouts",
    "check_list_loss",
    "check_logps",
    "check_loss_invariants",
    "check_unpaired_loss",
    "logits",
    "pair_logps",
    "pairs",
    "score_tables",
    "texts",
]
