"""DPO in transformers' own Trainer, by `compute_loss_func`; many processes by torchrun.

python examples/train_hf_trainer.py path/to/model pairs.jsonl.gz --out trained
"""

import argparse

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from dpo_ext import PairDataset, Tokenizer
from dpo_ext.torch import PairLoader, attach_scoring, preference_loss

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("pairs")
parser.add_argument("--out", default="trained")
parser.add_argument("--lr", type=float, default=1e-6)
parser.add_argument("--tokens-per-batch", type=int, default=8192)
parser.add_argument("--accumulate", type=int, default=1)
args = parser.parse_args()

settings = TrainingArguments(
    output_dir=args.out,
    num_train_epochs=1,
    learning_rate=args.lr,
    lr_scheduler_type="constant",
    gradient_accumulation_steps=args.accumulate,
    per_device_train_batch_size=1,  # one batch of the plan
    max_grad_norm=1.0,
    use_cpu=not torch.cuda.is_available(),
    logging_steps=1,
    save_strategy="no",
    report_to="none",
)
tokenizer = Tokenizer.from_pretrained(args.model)
with settings.main_process_first():  # one process encodes, the others map what it wrote
    pairs = PairDataset.from_files(args.pairs, tokenizer, on_bad="skip", cache_dir="cache")
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
model = attach_scoring(model.to(settings.device))
plan = pairs.plan(layout="padded", tokens_per_batch=args.tokens_per_batch)

ref_logps = torch.empty(len(pairs), 2, device=settings.device)
with torch.no_grad():  # the policy before training is the reference; every process scores it
    for batch in PairLoader(plan, device=settings.device):
        logps = model(**batch.model_inputs, score_table=batch.table).logps
        ref_logps[batch.pair_index] = logps


def collate(batches):
    """The one batch. Trainer counts `labels[..., 1:] != -100` over micro-batches and ranks: behind
    one place that it may leave out stand the numbers of the pairs, so that `num_items_in_batch` is
    the pairs of the step.
    """
    batch = batches[0].to("cpu")
    labels = torch.nn.functional.pad(batch.pair_index, (1, 0), value=-100)
    return {**batch.model_inputs, "score_table": batch.table, "labels": labels}


def loss(scores, labels, num_items_in_batch=None):
    reference = ref_logps[labels[1:]]
    return preference_loss(scores.logps, reference, beta=0.1, num_pairs=num_items_in_batch).loss


class PairTrainer(Trainer):
    def get_train_dataloader(self):  # the plan has an order; Accelerate gives each rank its share
        loader = DataLoader(self.train_dataset, batch_size=1, collate_fn=collate)
        return self.accelerator.prepare(loader)


trainer = PairTrainer(model, settings, train_dataset=plan, compute_loss_func=loss)
trainer.train()
if trainer.is_world_process_zero():
    steps = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for step, value in enumerate(steps):
        print(f"step {step}: loss {value:.6f}")
trainer.save_model(args.out)
