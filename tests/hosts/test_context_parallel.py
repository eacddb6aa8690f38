"""Sequences in parts over ranks: refused inside a model's forward, right from the rank's own logits."""

import pytest
import torch
import torch.distributed as dist
import warm

transformers = pytest.importorskip("transformers")

from tiny_models import V  # noqa: E402

from dpo_ext import TensorError  # noqa: E402
from dpo_ext.torch import ScoreTable, attach_scoring  # noqa: E402
from dpo_ext.torch.parallel import (  # noqa: E402
    context_parallel_sequence_logps,
    context_parallel_table,
)

T = 16
SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "initializer_range": 0.3,
}


def two_ranks(rank, store):
    from torch.distributed.tensor.experimental import context_parallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    attach_scoring(model, verify=True)
    ids = torch.randint(3, V, (4, T))
    labels = ids.clone()
    labels[:, :4] = -100
    table = ScoreTable.from_labels(labels)
    with torch.no_grad():
        want = model(input_ids=ids, score_table=table).logps
        whole = model(input_ids=ids).logits
    positions = torch.arange(T).repeat(4, 1)
    parts = [ids.clone(), labels.clone(), positions.clone()]
    with context_parallel(mesh, buffers=parts, buffer_seq_dims=[1, 1, 1]):
        here, its_labels, its_positions = parts
        assert here.shape == (4, T // 2)
        # the table of this rank's labels alone would score other tokens, or none, at the borders
        for some in (table, ScoreTable.from_labels(its_labels)):
            with pytest.raises(
                TensorError, match=r"inside `context_parallel`(.|\n)*adds the parts"
            ):
                model(input_ids=here, position_ids=its_positions, score_table=some)
        rows = (torch.arange(4)[:, None] * T + its_positions).flatten()
        # the CPU has no attention for this context: what the rank's forward would give
        local = whole.reshape(4 * T, V)[rows].reshape(4, T // 2, V)
        got = context_parallel_sequence_logps(local, context_parallel_table(table, rows))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, score_table=table).logps, want)
    dist.barrier()


@pytest.mark.slow
def test_two_processes_inside_context_parallel(tmp_path):
    imports = (*warm.TORCH, "transformers.models.llama.modeling_llama")
    warm.ranks(__name__, "two_ranks", tmp_path / "store", imports=imports)
