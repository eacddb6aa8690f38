"""Writes the table of `docs/models.md`: every class of transformers, the plan it takes, the difference measured.

`python docs/make_models.py` tries them all, which takes minutes.
"""

from __future__ import annotations

import gc
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
import tiny_models

from dpo_ext.torch import ScoreTable, attach_scoring
from dpo_ext.torch.forward import FOUND

PAGE = Path(__file__).parent / "models.md"
BEGIN = "<!-- table by docs/make_models.py -->"
SECONDS = 90


def one(name: str) -> tuple[str, str, str]:
    """(outcome, plan, remark) of one class."""
    try:
        model, right = tiny_models.build(name)
    except tiny_models.Unbuilt as why:
        return "not built", "", str(why)
    inputs, labels = tiny_models.batch(model)
    shift = {"shift": False} if model.config.is_encoder_decoder else {}
    table = ScoreTable.from_labels(labels, **shift)
    try:
        with torch.no_grad():
            scores = attach_scoring(model)(**inputs, score_table=table)
    except (TypeError, ValueError) as error:
        return "refused", "", str(error).partition("\n")[0]
    off = float((scores.logps.double() - right).abs().max())
    found = vars(model)[FOUND][1]
    plan = "logits" if scores.plan == "logits" else "head"
    return "right" if off < 1e-3 else "SILENT", plan, f"{off:.0e}; {found.reason}".rstrip("; ")


def main() -> None:
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

    def late(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    rows, count = [], Counter()
    for name in tiny_models.names():
        signal.alarm(SECONDS)
        try:
            outcome, plan, remark = one(name)
        except TimeoutError:
            outcome, plan, remark = "not built", "", f"takes more than {SECONDS} s"
        finally:
            signal.alarm(0)
            gc.collect()
        print(name, outcome, plan, remark, flush=True)
        count[outcome] += 1
        if outcome != "not built":
            rows.append(f"| `{name}` | {outcome} | {plan} | {remark} |")
        else:
            rows.append(f"| `{name}` | not built | | {remark} |")
    head, _, _ = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    tried = sum(count.values()) - count["not built"]
    said = (
        f"transformers {transformers.__version__}, torch {torch.__version__}, float32 on a CPU: {tried} classes tried, {count['right']} right, "
        f"{count['refused']} refused, **{count['SILENT']} silently wrong**; {count['not built']} could not be built tiny, or read no text alone."
    )
    table = "\n".join(
        [
            "| class | | plan | difference in nats; why not by the head |",
            "| --- | --- | --- | --- |",
            *rows,
        ]
    )
    PAGE.write_text(f"{head}{BEGIN}\n{said}\n\n{table}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
