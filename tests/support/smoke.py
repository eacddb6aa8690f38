"""Starts an installed package once: files to batches, with `--torch` log-probs and a gradient.

python tests/support/smoke.py [--torch]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import byte_tokenizer
import tiny

import dpo_ext


def main(folder: Path, *, with_torch: bool) -> str:
    """What ran, in one line.

    Raises:
        AssertionError: something came out wrong.
    """
    kernels = sorted(path.name for path in (Path(dpo_ext.__file__).parent / "cuda").iterdir())
    assert "token_stats.cu" in kernels, f"the package lacks the CUDA sources: {kernels}"
    file = tiny.write_jsonl(folder / "pairs.jsonl.gz", tiny.rows(64))
    tokenizer = byte_tokenizer.tokenizer(folder / "model")
    pairs = dpo_ext.PairDataset.from_files(str(file), tokenizer, threads=2)
    assert (pairs.report.read, len(pairs)) == (64, 64), pairs.report
    text = byte_tokenizer.decode(pairs[0]["prompt_ids"].tolist())
    assert text == tiny.rows(64)[0]["prompt"], text
    batches = list(pairs.plan(layout="packed", tokens_per_batch=4096, seed=0))
    assert sum(batch.n_pairs for batch in batches) == 64
    ran = f"dpo_ext {dpo_ext.__version__}: 64 pairs in {len(batches)} batches"
    return f"{ran}, {score(batches[0])}" if with_torch else ran


def score(batch: dpo_ext.Batch) -> str:
    """Log-probs and a gradient on the CPU against torch's own."""
    import torch

    from dpo_ext.torch import preference_loss, sequence_logps

    batch = batch.to("cpu")
    logits = torch.randn(*batch.input_ids.shape, 512, requires_grad=True)
    twin = logits.detach().clone().requires_grad_()
    ours = sequence_logps(logits, batch.table, impl="cpu")
    theirs = sequence_logps(twin, batch.table, impl="torch")
    for logps in (ours, theirs):
        preference_loss(logps, torch.zeros_like(logps)).loss.backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(logits.grad, twin.grad)
    return f"log-probs and gradient as torch {torch.__version__}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        print(main(Path(made), with_torch="--torch" in sys.argv[1:]))
