"""Packed and shared rows through real attention: same log-probs as padded, and no leak unseen."""

import copy

import numpy as np
import pytest
from pair_cases import random_pairs

from dpo_ext import PairDataset, TensorError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from dpo_ext.torch import assert_packing_safe, attach_scoring, sequence_logps  # noqa: E402

SETTINGS = {
    "vocab_size": 416,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}
# Windows of 6 are shorter than most of the sequences below.
MODELS = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "mistral-window": ("MistralConfig", {"sliding_window": 6}),
    "gemma2-window": (
        "Gemma2Config",
        {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16},
    ),
}
KINDS = [
    (name, implementation)
    for name in MODELS
    for implementation in ("eager", "sdpa")
    if (name, implementation) != ("gemma2-window", "sdpa")  # transformers has no such model
]


def model(name, implementation="eager", **more):
    config, settings = MODELS[name]
    config = getattr(transformers, config)(**{**SETTINGS, **settings, **more})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=implementation
        )


def edge_pairs():
    """Random lengths, and sides of one token, prompts of none and one, and a maximal row."""
    pairs = random_pairs(8, vocabulary=400, longest=20)
    lists = [list(ids) for ids in (pairs.prompt_ids, pairs.chosen_ids, pairs.rejected_ids)]
    for prompt, chosen, rejected in (
        ([7], [8], [9]),
        ([], [5, 6, 7], [8]),
        ([3, 4], [5], list(range(10, 40))),
        (list(range(50, 90)), list(range(40)), list(range(100, 140))),
    ):
        for column, ids in zip(lists, (prompt, chosen, rejected), strict=True):
            column.append(ids)
    return PairDataset.from_ids(*lists)


def plans(pairs):
    longest = int(pairs.tokens.max())
    bins = {"tokens_per_batch": 2 * longest, "bin_length": longest}
    return {
        "padded": pairs.plan(layout="padded", pairs_per_batch=5),
        "packed": pairs.plan(layout="packed", **bins),
        "shared": pairs.plan(layout="shared", **bins, pad_to_multiple_of=3),
    }


@pytest.mark.parametrize(("name", "implementation"), KINDS)
def test_three_layouts_give_the_same_log_probs_and_gradients(name, implementation):
    network = model(name, implementation)
    pairs = edge_pairs()
    upstream = torch.randn(len(pairs), 2, generator=torch.Generator().manual_seed(0))
    logps, grads = {}, {}
    for layout, plan in plans(pairs).items():
        network.zero_grad()
        logps[layout] = torch.zeros(len(pairs), 2)
        for batch in plan:
            moved = batch.to("cpu")
            logits = network(**moved.inputs_for(network)).logits
            scores = sequence_logps(logits, moved.table)
            (scores * upstream[moved.pair_index]).sum().backward()
            logps[layout][moved.pair_index] = scores.detach()
        grads[layout] = {n: p.grad.clone() for n, p in network.named_parameters()}
    want = logps["padded"]
    assert (want < 0).sum() >= 2 * len(pairs) - 1  # all but the one token that nothing predicts
    largest = max(g.abs().max() for g in grads["padded"].values())
    for layout in ("packed", "shared"):
        torch.testing.assert_close(logps[layout], want, rtol=1e-5, atol=1e-6)
        for parameter, grad in grads[layout].items():
            off = (grad - grads["padded"][parameter]).abs().max() / largest
            assert off <= 1e-5, (layout, parameter, off)


@pytest.mark.parametrize("name", ["qwen2-window", "mistral-window", "gemma2-window"])
def test_a_mask_without_the_window_is_wrong_by_itself_and_refused(name):
    """transformers applies no window to a mask of four dimensions that it is given."""
    network = model(name).eval()
    batch = edge_pairs().plan(layout="shared", pairs_per_batch=12)[0].to("cpu")
    with torch.no_grad():
        plain, right = (
            sequence_logps(network(**inputs).logits, batch.table)
            for inputs in (batch.model_inputs, batch.inputs_for(network))
        )
    assert (plain - right).abs().max() > 0.1
    with pytest.raises(TensorError, match="ignores the model's sliding window of 6"):
        assert_packing_safe(network, layout="shared")
    assert_packing_safe(network, layout="shared", inputs=lambda b: b.inputs_for(network))
    assert_packing_safe(network)
    # A window longer than the probe, too.
    longer = model(name, sliding_window=512)
    with pytest.raises(TensorError, match="ignores the model's sliding window of 512"):
        assert_packing_safe(longer, layout="shared")
    assert_packing_safe(longer, layout="shared", inputs=lambda b: b.inputs_for(longer))


@pytest.mark.parametrize("name", ["qwen2-window", "mistral-window", "gemma2-window"])
def test_scoring_refuses_a_mask_without_the_window(name):
    network = attach_scoring(model(name).eval())
    batch = edge_pairs().plan(layout="shared", pairs_per_batch=12)[0].to("cpu")
    with torch.no_grad():
        with pytest.raises(TensorError, match="ignores the model's sliding window of 6"):
            network(**batch.model_inputs, score_table=batch.table)
        found = network(**batch.inputs_for(network), score_table=batch.table).logps
        want = sequence_logps(network(**batch.inputs_for(network)).logits, batch.table)
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
        # A window that holds every row is no window.
        wide = attach_scoring(model(name, sliding_window=4096).eval())
        wide(**batch.model_inputs, score_table=batch.table)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_flex_attention_gets_block_masks(name, monkeypatch):
    from torch.nn.attention.flex_attention import BlockMask, flex_attention
    from transformers.integrations import flex_attention as host

    def uncompiled(query, key, value, training=False, **options):
        return flex_attention(query, key, value, **options)

    monkeypatch.setattr(host, "compile_friendly_flex_attention", uncompiled)
    network = model(name, "flex_attention").eval()
    dense = model(name, "sdpa").eval()
    batch = edge_pairs().plan(layout="shared", pairs_per_batch=12)[0].to("cpu")
    inputs = batch.inputs_for(network)
    assert isinstance(inputs["attention_mask"], BlockMask)
    with torch.no_grad():
        found = sequence_logps(network(**inputs).logits, batch.table)
        want = sequence_logps(dense(**batch.inputs_for(dense)).logits, batch.table)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


def test_varlen_attention_with_gathered_keys_is_attention_with_the_mask():
    batch = edge_pairs().plan(layout="shared", tokens_per_batch=400, bin_length=200)[0].to("cpu")
    size, width = batch.input_ids.numel(), batch.input_ids.shape[1]
    q, k, v = torch.randn(3, 2, size, 8, generator=torch.Generator().manual_seed(0)).unbind()

    def rows(x):
        return x.view(2, -1, width, 8).transpose(0, 1)

    from dpo_ext.layout.masks import dense_mask

    attend = torch.nn.functional.scaled_dot_product_attention
    want = attend(*map(rows, (q, k, v)), attn_mask=dense_mask(batch))
    found = torch.empty_like(q)
    ends = (batch.cu_seq_lens_q.tolist(), batch.cu_seq_lens_k.tolist())
    for i in range(len(ends[0]) - 1):
        queries, keys = slice(*ends[0][i : i + 2]), batch.kv_rows[slice(*ends[1][i : i + 2])]
        m, n = queries.stop - queries.start, len(keys)
        causal = torch.ones(m, n, dtype=torch.bool).tril(n - m)  # from the bottom right
        found[:, queries] = attend(q[:, queries], k[:, keys], v[:, keys], attn_mask=causal)
    torch.testing.assert_close(rows(found), want)


def test_eager_attention_never_gets_a_bool_mask_and_low_precision_its_own_dtype():
    batch = edge_pairs().plan(layout="shared", pairs_per_batch=3)[0].to("cpu")
    half = model("llama").to(torch.bfloat16)
    assert batch.inputs_for(half)["attention_mask"].dtype == torch.bfloat16
    assert batch.model_inputs["attention_mask"].dtype == torch.float32
    assert batch.inputs_for(model("llama", "sdpa"))["attention_mask"].dtype == torch.bool
    assert half(**batch.inputs_for(half)).logits.isfinite().all()


def test_models_that_no_mask_describes_are_refused():
    batch = edge_pairs().plan(layout="shared", pairs_per_batch=3)[0]
    network = model("llama")
    network.config._attn_implementation = "flash_attention_2"
    with pytest.raises(TensorError, match="'flash_attention_2', which takes no mask of its own"):
        batch.inputs_for(network)
    network = model("qwen2")
    network.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(TensorError, match="layers of the kind 'linear_attention'"):
        batch.inputs_for(network)


@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize(("name", "implementation"), KINDS)
def test_safe_models_pass(name, implementation, layout):
    network = model(name, implementation)
    assert_packing_safe(network, layout=layout, inputs=lambda batch: batch.inputs_for(network))


def test_dropout_and_low_precision_hide_nothing_and_refuse_nothing():
    network = model("llama", attention_dropout=0.5)
    assert_packing_safe(network)
    with pytest.raises(TensorError, match="see each other in train mode:"):
        assert_packing_safe(
            network,
            inputs=lambda b: {**b.model_inputs, "use_cache": network.training},
        )
    assert_packing_safe(model("llama").to(torch.bfloat16))


class Wrapped(torch.nn.Module):
    """Changes what the model inside is given."""

    def __init__(self, inner, change):
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, **arguments):
        return self.inner(**self.change(self, arguments))


def cached(self, arguments):
    return {**arguments, "use_cache": True}


def all_ones(self, arguments):
    return {**arguments, "attention_mask": torch.ones_like(arguments["input_ids"])}


def no_positions(self, arguments):
    return {name: value for name, value in arguments.items() if name != "position_ids"}


def checkpointed_only(self, arguments):
    on = self.inner.model.layers[0].gradient_checkpointing
    return all_ones(self, arguments) if on and self.training else arguments


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (cached, "eval mode"),
        (all_ones, "eval mode"),
        (no_positions, "eval mode"),
        (checkpointed_only, "train mode with gradient checkpointing"),
    ],
)
def test_set_ups_that_leak_are_refused(change, where):
    wrapped = Wrapped(model("llama"), change)
    with pytest.raises(TensorError, match=f"packed segments see each other in {where}:") as caught:
        assert_packing_safe(wrapped)
    assert "hint: pass use_cache=False and no attention_mask" in str(caught.value)


def test_wrong_positions_are_refused_where_nothing_leaks():
    class Positions(torch.nn.Module):
        """No attention at all: a token and its slot."""

        def __init__(self):
            super().__init__()
            self.tokens = torch.nn.Embedding(50, 8)
            self.slots = torch.nn.Embedding(200, 8)

        def forward(self, input_ids, position_ids=None, **_):
            return self.tokens(input_ids) + self.slots(torch.arange(input_ids.shape[1]))

    with pytest.raises(TensorError, match="not those of each sequence alone in eval mode"):
        assert_packing_safe(Positions())


def test_a_shared_batch_without_its_mask_is_refused():
    network = model("llama")

    def bare(batch):
        inputs = batch.model_inputs
        del inputs["attention_mask"]
        return inputs

    assert_packing_safe(network, layout="shared")
    with pytest.raises(TensorError, match="shared logits are not those of each sequence alone"):
        assert_packing_safe(network, layout="shared", inputs=bare)
    with pytest.raises(ValueError, match="unknown `layout` 'padded'"):
        assert_packing_safe(network, layout="padded")


@pytest.mark.parametrize("change", [None, all_ones])
def test_the_probe_leaves_everything_as_it_was(change):
    network = model("llama")
    network.train()
    network.model.layers[1].eval()
    network.model.layers[0].gradient_checkpointing = True
    wrapped = network if change is None else Wrapped(network, change)
    before = [(vars(m).get("gradient_checkpointing"), m.training) for m in wrapped.modules()]
    names = [sorted(vars(m)) for m in wrapped.modules()]
    weights = copy.deepcopy(wrapped.state_dict())
    state, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    try:
        assert_packing_safe(wrapped)
        assert change is None
    except TensorError:
        assert change is not None
    after = [(vars(m).get("gradient_checkpointing"), m.training) for m in wrapped.modules()]
    assert after == before
    assert [sorted(vars(m)) for m in wrapped.modules()] == names
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numbers).all()
    assert all(p.grad is None for p in wrapped.parameters())
    for name, value in wrapped.state_dict().items():
        assert torch.equal(value, weights[name])
