"""Log-probs of a reference, kept so that they cannot go stale.

`ReferenceStore` keeps them on disk, by what the model saw; `fingerprint` says of which reference.
"""

from dpo_ext.reflogps.identity import Fingerprint
from dpo_ext.reflogps.reference import fingerprint
from dpo_ext.reflogps.store import ReferenceStore, StoreStats

__all__ = ["Fingerprint", "ReferenceStore", "StoreStats", "fingerprint"]
