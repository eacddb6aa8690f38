"""The command `dpo-ext`; needs the extra `cli`."""

from dpo_ext.cli.app import main

__all__ = ["main"]
