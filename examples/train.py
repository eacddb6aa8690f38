"""DPO in a loop of your own, with evaluation on prompts that training has not seen.

python examples/train.py path/to/model pairs.jsonl.gz --out trained
"""

import argparse

import torch
from transformers import AutoModelForCausalLM

from dpo_ext import PairDataset, Tokenizer
from dpo_ext.torch import PairLoader, attach_scoring, preference_loss

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("pairs")
parser.add_argument("--out", default="trained")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--lr", type=float, default=1e-6)
parser.add_argument("--beta", type=float, default=0.1)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
model = attach_scoring(model)
tokenizer = Tokenizer.from_pretrained(args.model)
pairs = PairDataset.from_files(args.pairs, tokenizer, max_length=512, on_bad="skip")
print(pairs.report)


def batches(pairs, epoch=0):
    return PairLoader(pairs.plan(layout="padded", pairs_per_batch=8, epoch=epoch), device=device)


def losses(pairs, epoch=0):
    for batch in batches(pairs, epoch):
        logps = model(**batch.model_inputs, score_table=batch.table).logps
        yield preference_loss(logps, batch.ref_logps, loss="dpo", beta=args.beta)


with torch.no_grad():  # the policy before training is the reference
    ref_logps = torch.empty(len(pairs), 2, dtype=torch.float64)
    for batch in batches(pairs):
        logps = model(**batch.model_inputs, score_table=batch.table).logps
        ref_logps[batch.pair_index.cpu()] = logps.double().cpu()
train, held_out = pairs.with_ref_logps(ref_logps.numpy()).split(0.1)

optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
for epoch in range(args.epochs):
    for out in losses(train, epoch):
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        wins = torch.cat([out.chosen_rewards > out.rejected_rewards for out in losses(held_out)])
    print(f"epoch {epoch}: {wins.float().mean():.3f} of {len(held_out)} held-out pairs")
model.save_pretrained(args.out)
