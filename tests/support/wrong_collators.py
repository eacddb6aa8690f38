"""Wrong ways to lay pairs out, each one edit away from a right one."""

import torch
from collators import collate_packed, collate_trl

from dpo_ext.torch import ScoreTable


def edited(edit, collate=collate_trl):
    """A collator with one thing changed in (inputs, table)."""

    def wrong(rows):
        inputs, table = collate(rows)
        return edit(inputs, table, rows)

    return wrong


def table_like(table, **fields):
    parts = {k: getattr(table, k) for k in ("logit_rows", "targets", "seq_offsets")}
    return ScoreTable(**{**parts, **fields})


def swap_sides(inputs, table, rows):
    compact = table.compact()
    order = [s ^ 1 for s in range(len(compact.seq_offsets) - 1)]
    spans = [slice(*compact.seq_offsets[s : s + 2].tolist()) for s in order]
    sizes = [span.stop - span.start for span in spans]
    return inputs, ScoreTable(
        logit_rows=torch.cat([compact.logit_rows[span] for span in spans]),
        targets=torch.cat([compact.targets[span] for span in spans]),
        seq_offsets=torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32),
    )


def pad_is_a_token(rows):
    """Masks made by comparing with the pad id."""
    inputs, table = collate_trl(rows)
    return {**inputs, "attention_mask": (inputs["input_ids"] != 0).long()}, table


def prompt_scored(rows):
    inputs, _ = collate_trl(rows)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return inputs, ScoreTable.from_labels(labels)


def prompt_scored_with_weight_0(rows):
    """The log-probs are right, the lengths count the prompt."""
    inputs, right = collate_trl(rows)
    _, wide = prompt_scored(rows)
    weights = (right.targets != -100).float()
    return inputs, table_like(wide, weights=weights)


def last_token_lost(rows):
    short = [
        {k: v[:-1] if k != "prompt_ids" and len(v) > 1 else v for k, v in row.items()}
        for row in rows
    ]
    return collate_trl(short)


def writes_its_rows(rows):
    for row in rows:
        row["chosen_ids"][:] = row["chosen_ids"][::-1].copy()
    return collate_trl(rows)


COLLATORS = {
    "labels shifted twice": edited(lambda i, t, _: (i, table_like(t, targets=t.targets.roll(-1)))),
    "labels not shifted": edited(lambda i, t, _: (i, table_like(t, logit_rows=(t.logit_rows + 1) % i["input_ids"].numel()))),
    "sides swapped": edited(swap_sides),
    "mask all ones, left padded": edited(lambda i, t, _: ({**i, "attention_mask": torch.ones_like(i["input_ids"])}, t), lambda r: collate_trl(r, "left")),
    "no mask, left padded": edited(lambda i, t, _: ({"input_ids": i["input_ids"]}, t), lambda r: collate_trl(r, "left")),
    "pad id taken for padding": pad_is_a_token,
    "prompt scored": prompt_scored,
    "prompt scored with weight 0": prompt_scored_with_weight_0,
    "last token lost": last_token_lost,
    "positions run on across segments": edited(lambda i, t, _: ({**i, "position_ids": torch.arange(i["input_ids"].numel())[None]}, t), collate_packed),
    "rows of the neighbour": edited(lambda i, t, r: (i, collate_trl(r[::-1])[1])),
    "ids reversed": edited(lambda i, t, _: ({**i, "input_ids": i["input_ids"].flip(1)}, t)),
    "one pair too few": lambda rows: collate_trl(rows[:-1] or rows * 2),
    "prompt cut on one side": lambda rows: collate_trl([{**r, "prompt_ids": r["prompt_ids"][-1:]} for r in rows]),
    "writes its rows": writes_its_rows,
    "raises on one token": lambda rows: collate_trl([{**r, "chosen_ids": r["chosen_ids"][[0, 1]]} for r in rows]),
}  # fmt: skip
