"""Functions of other code bases, with their names, arguments and return values, computed here.

A file a code base: `dpo_ext.compat.trl`, `.liger`, `.llamafactory`, `.openrlhf`, `.dpo` (the
original code), `.verl`, `.torchtune`, `.open_instruct`, `.torch`. `patch` puts them in place of
theirs.
"""

from dpo_ext.extras import need

need("torch", "dpo_ext.compat")

from dpo_ext.compat.patching import Patch, patch
from dpo_ext.compat.swaps import PEERS

__all__ = ["PEERS", "Patch", "patch"]
