"""Which Lightning: `lightning`, or `pytorch_lightning`, whose classes are not the same ones.

A trainer of one takes no module of the other. The one that was imported first is meant; where
neither was, `lightning` is.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from dpo_ext.extras import need

NEW, OLD = "lightning", "pytorch_lightning"


def _found() -> Any:
    is_old = OLD in sys.modules and f"{NEW}.pytorch" not in sys.modules
    if find_spec(OLD) is not None and (is_old or find_spec(NEW) is None):
        return import_module(OLD)
    need(NEW, "dpo_ext.lightning")
    return import_module(f"{NEW}.pytorch")


pl: Any = _found()
