"""Wrong ways to lay pairs out, each one edit away from a right one."""

import numpy as np
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


def laid(rows, place=None, length=None, pad=0, mask=None, ids_of=None, scored=None, extra=0):
    """Padded on the right, one decision at a time: where a side starts, what is masked, scored."""
    sides = [(r["prompt_ids"], r[key]) for key in ("chosen_ids", "rejected_ids") for r in rows]
    T = max(len(p) + len(c) for p, c in sides) + extra
    ids = torch.full((len(sides), T), pad)
    seen = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for i, (p, c) in enumerate(sides):
        text = [*p.tolist(), *c.tolist()] if ids_of is None else ids_of(i, p.tolist(), c.tolist())
        at = 0 if place is None else place(i, T, len(text))
        ids[i, at : at + len(text)] = torch.tensor(text)
        seen[i, at : at + len(text)] = 1
        start, end = (len(p), len(text)) if scored is None else scored(i, len(p), len(text))
        start = max(start, 1)
        labels[i, at + start : at + end] = ids[i, at + start : at + end]
    if mask is not None:
        seen = mask(ids, seen)
    return {"input_ids": ids, "attention_mask": seen}, ScoreTable.from_labels(labels)


def with_(**decisions):
    return lambda rows: laid(rows, **decisions)


def positions(change, collate=collate_trl):
    """A collator that gives position ids too, `change` of (the right ones, its inputs)."""

    def wrong(inputs, table, rows):
        mask = inputs["attention_mask"]
        right = (mask.cumsum(1) - 1).clamp(min=0)
        return {**inputs, "position_ids": change(right, inputs)}, table

    return edited(wrong, collate)


def left(rows):
    return collate_trl(rows, "left")


def renamed(change):
    """`change` of the rows before they are laid out right."""
    return lambda rows: collate_trl([change(dict(row), k, rows) for k, row in enumerate(rows)])


def put(row, **fields):
    return {**row, **fields}


def packed(change):
    """`change` of (ids, positions, logit rows, targets, offsets, rows) of a packed batch."""

    def collate(rows):
        inputs, table = collate_packed(rows)
        return change(inputs["input_ids"], inputs["position_ids"], table, rows)

    return collate


def offsets_moved(inputs, table, rows):
    offsets = table.seq_offsets.clone()
    offsets[1:-1] -= (offsets[1:-1] > offsets[:-2] + 1).int()
    return inputs, table_like(table, seq_offsets=offsets)


def grows(rows):
    rows.append(dict(rows[-1]))
    return collate_trl(rows[:-1])


def adds_a_key(rows):
    for row in rows:
        row["input_ids"] = row["prompt_ids"]
    return collate_trl(rows)


def sorts_in_place(rows):
    rows.sort(key=lambda r: -len(r["chosen_ids"]))
    return collate_trl(rows)


def by_length(rows):
    return collate_trl(sorted(rows, key=lambda r: -len(r["chosen_ids"])))


def when(asked, change):
    """Right, but for batches of which `asked` holds."""
    return lambda rows: change(rows) if asked(rows) else collate_trl(rows)


def empty_prompt(rows):
    return any(not len(r["prompt_ids"]) for r in rows)


def scores_nothing(rows):
    inputs, table = collate_trl(rows)
    return inputs, table_like(table, targets=torch.full_like(table.targets, -100))


def first_token_scored(rows):
    """The first token of an empty prompt's completion is scored by the row before it."""
    inputs, table = collate_packed(rows)
    ids, at = inputs["input_ids"][0], inputs["position_ids"][0]
    starts = (at == 0).nonzero()[:, 0].tolist()
    logit_rows, targets, offsets = [], [], [0]
    k = 0
    for r in rows:
        for key in ("chosen_ids", "rejected_ids"):
            first = starts[k] + len(r["prompt_ids"])
            span = range(first, first + len(r[key]))
            logit_rows += [max(t - 1, 0) for t in span]
            targets += [int(ids[t]) for t in span]
            offsets.append(len(targets))
            k += 1
    rows_of = torch.tensor(logit_rows)
    if len(set(logit_rows)) < len(logit_rows):  # a table scores a row once
        return inputs, table
    return inputs, ScoreTable(logit_rows=rows_of, targets=targets, seq_offsets=offsets)


def one_row(rows, sees):
    """A packed batch with a block mask, which `sees` of (segment, query, key, position) makes."""
    inputs, table = collate_packed(rows)
    at = inputs["position_ids"][0]
    segment = (at == 0).cumsum(0)
    T = len(at)
    q, k = torch.arange(T)[:, None], torch.arange(T)[None]
    mask = sees(segment[:, None], segment[None], q, k)
    return {**inputs, "attention_mask": mask[None, None]}, table


def blocks(sees):
    return lambda rows: one_row(rows, sees)


def strip(ids):
    kept = ids
    while len(kept) > 1 and kept[-1] == 0:
        kept = kept[:-1]
    return kept


def once(ids):
    return ids[np.append(True, ids[1:] != ids[:-1])] if len(ids) else ids


def exchanged(ids):
    return np.concatenate((ids[1:2], ids[:1], ids[2:]))


def by_pair(at):
    starts = (at[0] == 0).nonzero()[:, 0].tolist()
    out = at.clone()
    for first, second, end in zip(
        starts[::2], starts[1::2], [*starts[2::2], at.shape[1]], strict=True
    ):
        out[0, second:end] += second - first
    return out


def restart(rows):
    inputs, table = collate_trl(rows)
    sides = [r for _ in range(2) for r in rows]
    at = torch.arange(inputs["input_ids"].shape[1]).repeat(len(sides), 1)
    for i, r in enumerate(sides):
        at[i, len(r["prompt_ids"]) :] -= len(r["prompt_ids"])
    return {**inputs, "position_ids": at}, table


def mask_token(rows, which):
    inputs, table = collate_trl(rows)
    mask = inputs["attention_mask"].clone()
    sides = [(r["prompt_ids"], r[key]) for key in ("chosen_ids", "rejected_ids") for r in rows]
    for i, (p, c) in enumerate(sides):
        mask[i, max(which(len(p), len(c)), 0)] = 0
    return {**inputs, "attention_mask": mask}, table


def halve(table):
    compact = table.compact()
    sequence = torch.repeat_interleave(
        torch.arange(len(compact.seq_offsets) - 1), compact.seq_offsets.diff()
    )
    return table_like(compact, targets=torch.where(sequence % 2 == 1, -100, compact.targets))


def averaged(table):
    compact = table.compact()
    sizes = compact.seq_offsets.diff()
    return table_like(
        compact, weights=torch.repeat_interleave(1 / sizes.clamp(min=1), sizes).float()
    )


def interleaved(table):
    compact = table.compact()
    n = len(compact.seq_offsets) - 1
    order = [*range(0, n, 2), *range(1, n, 2)]
    spans = [slice(*compact.seq_offsets[s : s + 2].tolist()) for s in order]
    sizes = torch.tensor([0] + [s.stop - s.start for s in spans]).cumsum(0)
    return ScoreTable(
        logit_rows=torch.cat([compact.logit_rows[s] for s in spans]),
        targets=torch.cat([compact.targets[s] for s in spans]),
        seq_offsets=sizes.int(),
    )


def shared_start_not_scored(rows):
    def start(i, p, n):
        a, b = (rows[i % len(rows)][k].tolist() for k in ("chosen_ids", "rejected_ids"))
        same = 0
        while same < min(len(a), len(b)) - 1 and a[same] == b[same]:
            same += 1
        return p + same, n

    return laid(rows, scored=start)


LAYOUTS = {
    # padding
    "padded on the left, masked on the right": edited(lambda i, t, _: ({**i, "attention_mask": i["attention_mask"].flip(1)}, t), left),
    "the first token masked": edited(lambda i, t, _: ({**i, "attention_mask": torch.cat((0 * i["attention_mask"][:, :1], i["attention_mask"][:, 1:]), 1)}, t)),
    "the last token of a prompt masked": lambda rows: mask_token(rows, lambda p, c: p - 1),
    "the first token of a completion masked": lambda rows: mask_token(rows, lambda p, c: p),
    "a mask of floats, its pads 0.1": edited(lambda i, t, _: ({**i, "attention_mask": i["attention_mask"].double() + 0.1}, t), left),
    "one pad seen on the left": edited(lambda i, t, _: ({**i, "attention_mask": (i["attention_mask"].flip(1).cumsum(1).flip(1) > 0).long() | i["attention_mask"].roll(-1, 1)}, t), left),
    "pads seen where a row is long": when(lambda rows: max(len(r["chosen_ids"]) for r in rows) > 64, edited(lambda i, t, _: ({"input_ids": i["input_ids"]}, t), left)),
    "a token of -100 for pads, unmasked": edited(lambda i, t, _: ({**i, "attention_mask": (i["input_ids"] != 0).long()}, t), left),
    "pads cut from the end of a text": renamed(lambda r, k, rows: put(r, chosen_ids=strip(r["chosen_ids"]))),
    "pads cut from the front of a prompt": renamed(lambda r, k, rows: put(r, prompt_ids=strip(r["prompt_ids"][::-1])[::-1])),
    "labels by comparing with the pad": edited(lambda i, t, _: (i, table_like(t, targets=t.targets.masked_fill(t.targets == 0, -100)))),
    # positions
    "positions from 1": positions(lambda at, i: at + 1),
    "positions that count pads": positions(lambda at, i: torch.arange(at.shape[1]).expand_as(at), left),
    "positions all 0": positions(lambda at, i: at * 0),
    "positions turned": positions(lambda at, i: at.flip(1)),
    "positions that restart at the completion": restart,
    "positions of the longest for all": positions(lambda at, i: at + at.shape[1] - 1 - at.amax(1, keepdim=True)),
    "positions within 63": positions(lambda at, i: at.clamp(max=63)),
    "positions within 127": positions(lambda at, i: at.clamp(max=127)),
    "positions of the neighbour": packed(lambda ids, at, t, rows: ({"input_ids": ids, "position_ids": at.roll(1, 1)}, t)),
    "positions from 1 in a pack": packed(lambda ids, at, t, rows: ({"input_ids": ids, "position_ids": at + 1}, t)),
    "no positions in a pack": packed(lambda ids, at, t, rows: ({"input_ids": ids}, t)),
    "a mask of ones beside a pack": packed(lambda ids, at, t, rows: ({"input_ids": ids, "position_ids": at, "attention_mask": torch.ones_like(ids)}, t)),
    "positions that restart at each pair": packed(lambda ids, at, t, rows: ({"input_ids": ids, "position_ids": by_pair(at)}, t)),
    # masks of two dimensions
    "a pack's mask that sees the pair": blocks(lambda a, b, q, k: (k <= q) & ((a - 1) // 2 == (b - 1) // 2)),
    "a pack's mask that sees all before": blocks(lambda a, b, q, k: k <= q),
    "a pack's mask that does not see itself": blocks(lambda a, b, q, k: (k < q) & (a == b)),
    "a pack's mask that sees 8 tokens": blocks(lambda a, b, q, k: (k <= q) & (a == b) & (q - k < 8)),
    "a pack's mask that sees 64 tokens": blocks(lambda a, b, q, k: (k <= q) & (a == b) & (q - k < 64)),
    "a pack's mask that misses the first segment's first token": blocks(lambda a, b, q, k: (k <= q) & (a == b) & (k > 0)),
    # what is scored
    "the last token of a prompt scored": with_(scored=lambda i, p, n: (p - 1, n)),
    "the first token of a completion not scored": with_(scored=lambda i, p, n: (p + 1 if n > p + 1 else p, n)),
    "the last token of a completion not scored": with_(scored=lambda i, p, n: (p, n - 1 if n > p + 1 else n)),
    "the last token of the longest not scored": edited(lambda i, t, _: (i, table_like(t, targets=torch.where(t.logit_rows == i["input_ids"].shape[1] - 2, -100, t.targets)))),
    "64 tokens of a completion scored": with_(scored=lambda i, p, n: (p, min(n, p + 64))),
    "the last 64 tokens of a completion scored": with_(scored=lambda i, p, n: (max(p, n - 64), n)),
    "nothing scored": scores_nothing,
    "the rejected ones not scored": edited(lambda i, t, _: (i, halve(t))),
    "a shared start not scored": shared_start_not_scored,
    "each target one row late": edited(lambda i, t, _: (i, table_like(t, logit_rows=(t.logit_rows + 1).clamp(max=i["input_ids"].numel() - 1)))),
    "offsets moved by a token": edited(offsets_moved, collate_packed),
    "weights of a half": edited(lambda i, t, _: (i, table_like(t, weights=torch.full((len(t.targets),), 0.5)))),
    "an average for a sum": edited(lambda i, t, _: (i, averaged(t))),
    "the first token scored by the row before": first_token_scored,
    # pairs
    "chosen and rejected of two pairs exchanged": lambda rows: collate_trl([put(r, rejected_ids=rows[k - 1]["rejected_ids"]) for k, r in enumerate(rows)]),
    "chosen one after the other, the table by pairs": edited(lambda i, t, r: (i, interleaved(t))),
    "rows by length": by_length,
    "sorts its rows": sorts_in_place,
    "five pairs at most": lambda rows: collate_trl(rows[:4]),
    "a prompt of the pair before": lambda rows: collate_trl([put(r, prompt_ids=rows[k - 1]["prompt_ids"]) for k, r in enumerate(rows)]),
    "equal sides made one": when(lambda rows: any(r["chosen_ids"].tolist() == r["rejected_ids"].tolist() for r in rows), lambda rows: collate_trl(rows[1:] or rows)),
    "chosen for both": renamed(lambda r, k, rows: put(r, rejected_ids=r["chosen_ids"])),
    "wrong for one pair": when(lambda rows: len(rows) == 1, lambda rows: COLLATORS["labels not shifted"](rows)),
    "wrong for five pairs": when(lambda rows: len(rows) == 5, lambda rows: COLLATORS["labels not shifted"](rows)),
    "wrong where nothing is padded": when(lambda rows: len({len(r["prompt_ids"]) + len(r[k]) for r in rows for k in ("chosen_ids", "rejected_ids")}) == 1, lambda rows: COLLATORS["labels not shifted"](rows)),
    # texts
    "prompts cut to 64 on the left": renamed(lambda r, k, rows: put(r, prompt_ids=r["prompt_ids"][-64:])),
    "prompts cut to 64 on the right": renamed(lambda r, k, rows: put(r, prompt_ids=r["prompt_ids"][:64])),
    "completions cut to 64": renamed(lambda r, k, rows: put(r, chosen_ids=r["chosen_ids"][:64], rejected_ids=r["rejected_ids"][:64])),
    "rows cut to 128": with_(ids_of=lambda i, p, c: (p + c)[:128]),
    "a token before each prompt": renamed(lambda r, k, rows: put(r, prompt_ids=np.append(np.int32(1), r["prompt_ids"]))),
    "a token after each completion": renamed(lambda r, k, rows: put(r, chosen_ids=np.append(r["chosen_ids"], np.int32(1)))),
    "repeated tokens dropped": renamed(lambda r, k, rows: put(r, chosen_ids=once(r["chosen_ids"]))),
    "a completion's start that ends its prompt dropped": renamed(lambda r, k, rows: put(r, chosen_ids=r["chosen_ids"][1:] if len(r["chosen_ids"]) > 1 and r["prompt_ids"][-1:].tolist() == r["chosen_ids"][:1].tolist() else r["chosen_ids"])),
    "ids in int8": renamed(lambda r, k, rows: {name: ids.astype(np.int8) % 64 for name, ids in r.items()}),
    "two tokens exchanged": renamed(lambda r, k, rows: put(r, prompt_ids=exchanged(r["prompt_ids"]))),
    "prompt sorted": renamed(lambda r, k, rows: put(r, prompt_ids=np.sort(r["prompt_ids"]))),
    # empty prompts
    "IndexError for an empty prompt": when(empty_prompt, lambda rows: [][0]),
    "an empty prompt is a pad": renamed(lambda r, k, rows: put(r, prompt_ids=r["prompt_ids"] if len(r["prompt_ids"]) else np.zeros(1, np.int32))),
    "pairs of an empty prompt dropped": lambda rows: collate_trl([r for r in rows if len(r["prompt_ids"])] or rows[:0] or rows),
    "the first token of an empty prompt's completion dropped": renamed(lambda r, k, rows: r if len(r["prompt_ids"]) else put(r, chosen_ids=r["chosen_ids"][1:])),
    # what it does beside
    "appends to its rows": grows,
    "adds a key to its rows": adds_a_key,
    "returns its table alone": lambda rows: collate_trl(rows)[1],
    "returns logits of a batch too small": edited(lambda i, t, _: ({k: v[:-1] for k, v in i.items()}, t)),
    "raises for equal sides": when(lambda rows: any(r["chosen_ids"].tolist() == r["rejected_ids"].tolist() for r in rows), lambda rows: [][0]),
    "ValueError for long rows": when(lambda rows: any(len(r["prompt_ids"]) > 64 for r in rows), lambda rows: int("long")),
}  # fmt: skip

ALL = {name: (collate, {}) for name, collate in {**COLLATORS, **LAYOUTS}.items()}
