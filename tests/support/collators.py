"""Right collators: a padded one as TRL's, and a packed one."""

import torch

from dpo_ext.torch import ScoreTable


def collate_trl(rows, side="right"):
    sides = [(r["prompt_ids"], r[key]) for key in ("chosen_ids", "rejected_ids") for r in rows]
    T = max(len(p) + len(c) for p, c in sides)
    ids = torch.zeros(len(sides), T, dtype=torch.int64)
    mask, labels = ids.clone(), ids - 100
    for i, (p, c) in enumerate(sides):
        at = 0 if side == "right" else T - len(p) - len(c)
        end = at + len(p) + len(c)
        ids[i, at:end] = torch.tensor([*p.tolist(), *c.tolist()])
        mask[i, at:end] = 1
        labels[i, at + len(p) : end] = torch.tensor(c)
        if not len(p):  # nothing stands before the first token of an empty prompt
            labels[i, at] = -100
    return {"input_ids": ids, "attention_mask": mask}, ScoreTable.from_labels(labels)


def collate_packed(rows):
    ids, positions, logit_rows, targets, offsets = [], [], [], [], [0]
    for r in rows:
        for key in ("chosen_ids", "rejected_ids"):
            p, c = r["prompt_ids"].tolist(), r[key].tolist()
            first = int(not p)  # nothing stands before the first token of an empty prompt
            logit_rows += range(len(ids) + len(p) - 1 + first, len(ids) + len(p) + len(c) - 1)
            targets += c[first:]
            ids += p + c
            positions += range(len(p) + len(c))
            offsets.append(len(targets))
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
    return inputs, ScoreTable(logit_rows=logit_rows, targets=targets, seq_offsets=offsets)
