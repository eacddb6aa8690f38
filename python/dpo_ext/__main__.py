"""``python -m dpo_ext`` is the command `dpo-ext`."""

from dpo_ext.cli import main

if __name__ == "__main__":
    main()
