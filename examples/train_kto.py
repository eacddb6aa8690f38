"""KTO in a loop of your own, on completions with a thumb up or down: prompt, completion, label.

python examples/train_kto.py path/to/model thumbs.jsonl --out trained
"""

import argparse

import torch
from transformers import AutoModelForCausalLM

from dpo_ext import Tokenizer, UnpairedDataset
from dpo_ext.torch import PairLoader, attach_scoring, kto_z, unpaired_loss

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("examples")
parser.add_argument("--out", default="trained")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--lr", type=float, default=1e-6)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model, reference = (
    attach_scoring(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device))
    for _ in range(2)
)
tokenizer = Tokenizer.from_pretrained(args.model)
examples = UnpairedDataset.from_files(args.examples, tokenizer, max_length=512, on_bad="skip")
print(examples.report)
train, held_out = examples.split(0.1)
undesirable = (~train.labels).sum() / max(train.labels.sum(), 1)  # both kinds weigh the same


def score(model, batch):
    return model(**batch.model_inputs, score_table=batch.table).logps[:, 0]


def losses(examples, epoch=0):
    plan = examples.plan(layout="padded", examples_per_batch=8, epoch=epoch, drop_last=epoch > 0)
    for batch in PairLoader(plan, device=device):
        with torch.no_grad():
            z = kto_z(score(model, batch.kl), score(reference, batch.kl))
            ref_logps = score(reference, batch)
        yield unpaired_loss(
            score(model, batch), ref_logps, batch.labels, beta=0.1, z=z, lam_d=float(undesirable)
        )


optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
for epoch in range(args.epochs):
    for out in losses(train, epoch + 1):
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        rewards = torch.cat([out.rewards * (2 * out.labels - 1) for out in losses(held_out)])
    print(f"epoch {epoch}: {rewards.mean():.4f} a thumb, {len(held_out)} held-out completions")
model.save_pretrained(args.out)
