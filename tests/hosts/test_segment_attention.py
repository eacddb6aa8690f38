"""Attention segment by segment: the numbers of the dense mask, forward and backward, and never its square."""

import copy
import pickle
import sys
import types
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tiny_models  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import dpo_ext.torch.interface as interface  # noqa: E402
import dpo_ext.torch.segments as by_segment  # noqa: E402
from dpo_ext import PairDataset, TensorError  # noqa: E402
from dpo_ext.layout.segments import SEGMENTS, SegmentMask, Segments  # noqa: E402
from dpo_ext.torch import (  # noqa: E402
    ScoreTable,
    assert_packing_safe,
    attach_scoring,
    segment_attention,
    use_segment_attention,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore:.*RoPE.*", "ignore::DeprecationWarning"
)
# Lengths on both sides of what is worked off together, in blocks, and alone.
LENGTHS = [1, 2, 5, 17, 40, 90, 300]


def dense(query, key, value, segments, window=None, softcap=None, sinks=None):
    """The equation of `segment_attention`, with a mask of T x T."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~SegmentMask.of(segments, window).dense(), float("-inf"))
    T = scores.shape[-1]
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return (scores.softmax(-1)[..., :T] @ value).transpose(1, 2)


@st.composite
def layouts(draw):
    """Rows of segments, some behind a prefix, which lies before them in their row."""
    rows, width = draw(st.integers(1, 2)), draw(st.sampled_from([3, 64, 400]))
    offsets, prefixes = [0], []
    for row in range(rows):
        at = 0
        while at < width:
            length = min(width - at, draw(st.sampled_from(LENGTHS)))
            first = draw(st.integers(0, at))
            behind = draw(st.integers(first, at)) if draw(st.booleans()) else first
            prefixes.append((row * width + first, row * width + behind))
            at += length
            offsets.append(row * width + at)
    kept = np.array(prefixes) if draw(st.booleans()) else None
    return Segments((rows, width), np.array(offsets), kept)


@pytest.mark.parametrize("kernel", [True, False])
@settings(deadline=None)
@given(
    segments=layouts(),
    heads=st.sampled_from([(4, 2), (2, 2), (3, 1)]),
    size=st.sampled_from([8, 4, 12]),
    window=st.sampled_from([None, None, 1, 3, 70]),
    softcap=st.sampled_from([None, None, 3.0]),
    sinks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_attention_is_that_of_the_dense_mask(
    kernel, segments, heads, size, window, softcap, sinks, seed
):
    torch.manual_seed(seed)
    (rows, width), (H, K) = segments.shape, heads
    tensors = [torch.randn(rows, h, width, d) for h, d in ((H, 8), (K, 8), (K, size))]
    tensors += [torch.randn(H)] if sinks else []
    for t in tensors:
        t.requires_grad_()
    options = {"window": window, "softcap": softcap, "sinks": tensors[3] if sinks else None}
    serves = by_segment.serves
    by_segment.serves = serves if kernel else lambda query, call: False  # as on another device
    try:
        got = segment_attention(*tensors[:3], segments, **options)
    finally:
        by_segment.serves = serves
    want = dense(*tensors[:3], segments, **options)
    assert got.is_contiguous()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(want)
    for x, y in zip(
        torch.autograd.grad((got * upstream).sum(), tensors),
        torch.autograd.grad((want * upstream).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(x, y, atol=1e-5 * max(1, float(y.abs().max())), rtol=1e-4)


def test_attention_drops_weights_in_training_alone():
    segments = Segments((1, 300), np.array([0, 100, 300]))
    q = torch.randn(1, 2, 300, 8)
    whole = segment_attention(q, q, q, segments)
    torch.manual_seed(0)
    dropped = segment_attention(q, q, torch.ones_like(q), segments, dropout=0.5)
    assert not torch.allclose(segment_attention(q, q, q, segments, dropout=0.5), whole)
    assert dropped.mean().item() == pytest.approx(1, abs=0.1)


def test_segments_that_are_not_of_these_rows_are_refused():
    q = torch.randn(1, 2, 6, 4)
    with pytest.raises(ValueError, match="`segments` are of rows"):
        segment_attention(q, q, q, Segments((1, 5), np.array([0, 5])))
    with pytest.raises(ValueError, match="`backend` must be one of"):
        segment_attention(q, q, q, Segments((1, 6), np.array([0, 6])), backend="magic")


# ---- models --------------------------------------------------------------------------------------

SERVED = [
    "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM",
    "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "CohereForCausalLM", "Cohere2ForCausalLM", "GraniteForCausalLM",
    "GPT2LMHeadModel", "GPTNeoXForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM", "StableLmForCausalLM", "Olmo2ForCausalLM",
    "Starcoder2ForCausalLM", "HeliumForCausalLM", "GlmForCausalLM", "SmolLM3ForCausalLM", "Llama4ForCausalLM", "GptOssForCausalLM",
    "LlavaForConditionalGeneration",
]  # fmt: skip
OTHERS = ["MambaForCausalLM", "NemotronHForCausalLM", "BloomForCausalLM", "MptForCausalLM", "FalconForCausalLM", "T5ForConditionalGeneration"]  # fmt: skip


def tiny(name):
    if not hasattr(transformers, name):
        pytest.skip("not in this transformers")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return tiny_models.build(name)[0]
    except tiny_models.Unbuilt as why:
        pytest.skip(str(why))


def row_of(lengths):
    torch.manual_seed(5)
    ids = torch.randint(3, tiny_models.V - 4, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": ids, "position_ids": positions, "use_cache": False}


def gradients(model, hidden, upstream):
    model.zero_grad()
    (hidden * upstream).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", SERVED)
def test_a_packed_row_is_its_segments_alone_forward_and_backward(name):
    model = tiny(name)
    if transformers.__version__.startswith("4.") and not model._can_set_attn_implementation():
        pytest.skip("attention of its own in this transformers")
    lengths = [7, 1, 20, 3, 3, 3]
    row = row_of(lengths)
    alone = copy.deepcopy(model)
    parts = row["input_ids"].split(lengths, 1)
    want = torch.cat([alone.base_model(input_ids=p, use_cache=False)[0] for p in parts], 1)
    assert use_segment_attention(model) is model
    with no_square(sum(lengths)):
        got = model.base_model(**row)[0]
    scale = float(want.detach().abs().max())
    torch.testing.assert_close(got, want, atol=1e-5 * scale, rtol=1e-4)
    upstream = torch.randn_like(want)
    expected = gradients(alone, want, upstream)
    for parameter, grad in gradients(model, got, upstream).items():
        largest = float(expected[parameter].abs().max())
        torch.testing.assert_close(
            grad, expected[parameter], atol=1e-4 * largest + 1e-6, rtol=1e-3, msg=parameter
        )
    assert_packing_safe(model)


class no_square(TorchDispatchMode):  # noqa: N801
    """No tensor inside has two sizes of a row."""

    def __init__(self, width):
        super().__init__()
        self.width, self.largest = width, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and not isinstance(t, SegmentMask):
                assert list(t.shape).count(self.width) < 2, f"{function}: {tuple(t.shape)}"
                self.largest = max(self.largest, t.numel())
        return out


@pytest.mark.parametrize("name", OTHERS)
def test_what_does_not_attend_by_segments_is_said_and_stays_as_it_was(name):
    model = tiny(name)
    before = interface.attention_of(model)
    with pytest.raises(
        TensorError, match=r'cannot attend segment by segment: .*\nhint: use layout="padded"'
    ):
        use_segment_attention(model)
    assert interface.attention_of(model) == before


def llama(**options):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = transformers.LlamaConfig(
        vocab_size=64,
        num_hidden_layers=2,
        initializer_range=0.3,
        max_position_embeddings=65536,
        **sizes,
        **options,
    )
    return transformers.LlamaForCausalLM(config)


def windowed(kind="MistralConfig", **options):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    config = getattr(transformers, kind)(
        vocab_size=64,
        num_hidden_layers=2,
        initializer_range=0.3,
        sliding_window=6,
        pad_token_id=0,
        **sizes,
        **options,
    )
    return transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )


WINDOWS = {
    "mistral": lambda: windowed(),
    "gemma2": lambda: windowed("Gemma2Config", query_pre_attn_scalar=8, attn_logit_softcapping=2.0),
    "gemma3": lambda: windowed("Gemma3TextConfig", query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"]),
    "qwen2": lambda: windowed("Qwen2Config", use_sliding_window=True, max_window_layers=1),
}  # fmt: skip


def pairs():
    generator = np.random.default_rng(3)
    lists = [
        [generator.integers(3, 60, generator.integers(1, 40)).tolist() for _ in range(4)]
        for _ in range(3)
    ]
    lists[0][1] = []
    return PairDataset.from_ids(*lists, pad_id=0)


@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("name", WINDOWS)
def test_windows_softcap_and_prefixes_give_the_log_probs_of_padded_rows(name, layout):
    plain, model = WINDOWS[name](), use_segment_attention(WINDOWS[name]())
    padded = pairs().plan(layout="padded", pairs_per_batch=4, shuffle=False)[0].to()
    batch = pairs().plan(layout=layout, tokens_per_batch=600, shuffle=False)[0].to()
    attach_scoring(plain, attention="model"), attach_scoring(model)
    want = plain(**padded.model_inputs, score_table=padded.table).logps
    with no_square(batch.input_ids.shape[1]):
        got = model(**batch.inputs_for(model), score_table=batch.table).logps
    order = batch.pair_index.argsort()
    torch.testing.assert_close(got[order], want[padded.pair_index.argsort()], atol=1e-3, rtol=1e-5)
    weights = torch.randn_like(want)
    (got[order] * weights).sum().backward()
    (want[padded.pair_index.argsort()] * weights).sum().backward()
    for (parameter, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            p.grad, q.grad, atol=1e-4 * float(q.grad.abs().max()), rtol=1e-3, msg=parameter
        )
    assert_packing_safe(model, layout=layout, inputs=lambda b: b.inputs_for(model))


@pytest.mark.parametrize("name", [*WINDOWS, "gpt-oss"])
def test_padded_rows_and_generation_are_as_before(name):
    plain = tiny("GptOssForCausalLM") if name == "gpt-oss" else WINDOWS[name]().eval()
    model = use_segment_attention(copy.deepcopy(plain))
    ids = torch.randint(3, 60, (3, 15), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    real = mask.bool()
    torch.testing.assert_close(
        model(**inputs).logits[real], plain(**inputs).logits[real], atol=1e-3, rtol=1e-4
    )
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **options), plain.generate(**inputs, **options))


@pytest.mark.parametrize("window", [16, 17, 18])
def test_a_row_as_wide_as_the_window_is_its_segments_alone(window):
    """gpt-oss does not tell its masks where segments begin; a row of 17 is shorter than no window of 17."""
    model = tiny("GptOssForCausalLM")
    config = copy.deepcopy(model.config)
    config.sliding_window = window
    torch.manual_seed(0)
    model = use_segment_attention(type(model)(config).eval())
    row = row_of([9, 8])
    both = model.base_model(**row)[0]
    for start, stop in ((0, 9), (9, 17)):
        alone = {n: v[:, start:stop] if n != "use_cache" else v for n, v in row.items()}
        want = model.base_model(**alone)[0]
        torch.testing.assert_close(both[:, start:stop], want, atol=1e-4, rtol=1e-4)


def test_a_bias_that_counts_along_the_row_is_refused():
    """Falcon's ALiBi is rounded to bfloat16: at slot 5,000 neighbours are one place, which short trials do not see."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.FalconConfig(vocab_size=tiny_models.V, **shape, alibi=True)
    model = attach_scoring(transformers.FalconForCausalLM(config).eval())
    with pytest.raises(TensorError, match="FalconForCausalLM has ALiBi"):
        assert_packing_safe(model)
    row = row_of([9, 8])
    labels = row["input_ids"].clone()
    with pytest.raises(TensorError, match="FalconForCausalLM has ALiBi"):
        model(**row, score_table=ScoreTable.from_labels(labels, group_size=1))


def test_memory_is_linear_in_the_tokens_of_a_row():
    model, largest = use_segment_attention(llama()), []
    for count in (10, 20):
        row = row_of([200] * count)
        with no_square(200 * count) as seen:
            model.base_model(**row)[0].sum().backward()
        largest.append(seen.largest)
    assert largest[1] <= 2.1 * largest[0] < 200 * 200 * 4 * 20


def test_gradient_checkpointing_changes_nothing():
    grads = []
    for on in (False, True):
        model = use_segment_attention(llama()).train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        row = row_of([9, 30, 4])
        hidden = model.base_model(**row)[0]
        grads.append(gradients(model, hidden, torch.ones_like(hidden)))
    for parameter, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][parameter])


@pytest.mark.slow
def test_a_compiled_model_is_never_wrong():
    model = use_segment_attention(llama())
    row = row_of([9, 30, 4])
    want = model.base_model(**row)[0]
    got = torch.compile(model.base_model, backend="eager")(**row)[0]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_compiled_model_whose_mask_is_not_told_its_segments_leaves_the_graph():
    model = use_segment_attention(tiny("GptOssForCausalLM"))
    offsets = torch.tensor([0, 9, 17], dtype=torch.int32)
    with torch.no_grad():
        want = model.base_model(**row_of([9, 8]))[0]
        compiled = torch.compile(model.base_model, backend="eager")
        got = compiled(**row_of([9, 8]), cu_seq_lens_q=offsets)
    torch.testing.assert_close(got[0], want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GptOssForCausalLM"])
def test_inference_mode_reads_packed_rows(name):
    model = use_segment_attention(tiny(name))
    with torch.inference_mode():
        row = row_of([9, 300, 8]) if name[0] == "L" else row_of([9, 30, 8])
        got = model.base_model(**row)[0]
    torch.testing.assert_close(got, model.base_model(**row_of(row_lengths(row)))[0])


def row_lengths(row):
    begins = [*np.flatnonzero(row["position_ids"][0].numpy() == 0), row["input_ids"].shape[1]]
    return np.diff(begins).tolist()


def test_offsets_alone_are_enough_where_a_layer_is_told_them():
    model = use_segment_attention(tiny("GptOssForCausalLM"))
    row = row_of([9, 8])
    want = model.base_model(**row)[0]
    again = {**row, "position_ids": row["position_ids"].clone()}
    offsets = torch.tensor([0, 9, 17], dtype=torch.int32)
    torch.testing.assert_close(model.base_model(**again, cu_seq_lens_q=offsets)[0], want)


# ---- who chooses it ------------------------------------------------------------------------------


def test_scoring_chooses_it_and_the_caller_may_say_otherwise():
    packed = pairs().plan(layout="packed", tokens_per_batch=600, shuffle=False)[0].to()
    model = attach_scoring(llama())
    assert interface.attention_of(model) == SEGMENTS
    want = attach_scoring(llama(), attention="model")
    assert interface.attention_of(want) == "sdpa"
    call = {**packed.model_inputs, "score_table": packed.table}
    torch.testing.assert_close(model(**call).logps, want(**call).logps, atol=1e-3, rtol=1e-5)
    chosen = attach_scoring(windowed())  # eager, which its user chose
    assert interface.attention_of(chosen) == "eager"
    assert interface.attention_of(attach_scoring(chosen, attention="segments")) == SEGMENTS
    with pytest.raises(ValueError, match="`attention` must be one of"):
        attach_scoring(model, attention="flash")
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again(**call).logps, model(**call).logps)


@pytest.mark.parametrize("name", ["MambaForCausalLM", "NemotronHForCausalLM"])
def test_packed_rows_of_a_model_that_leaks_are_an_error_that_names_the_cure(name):
    model = attach_scoring(tiny(name))
    packed = pairs().plan(layout="packed", tokens_per_batch=600, shuffle=False)[0].to()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            with pytest.raises(TensorError, match=r'packed.*\nhint: use layout="padded"'):
                model(**packed.model_inputs, score_table=packed.table)


def test_a_model_that_gives_other_numbers_keeps_its_own_attention(monkeypatch):
    wrong = segment_attention
    monkeypatch.setattr(interface, "segment_attention", lambda *a, **k: wrong(*a, **k) * 1.5)
    model = attach_scoring(llama())
    packed = pairs().plan(layout="packed", tokens_per_batch=600, shuffle=False)[0].to()
    call = {**packed.model_inputs, "score_table": packed.table}
    with pytest.warns(UserWarning, match="LlamaForCausalLM keeps its own attention.*off by"):
        got = model(**call).logps
    assert interface.attention_of(model) == "sdpa"
    want = attach_scoring(llama(), attention="model")(**call).logps
    assert torch.equal(got, want)
    with pytest.raises(TensorError, match="hidden states are off by"):
        use_segment_attention(llama())


def test_a_mask_that_others_read_is_built_and_said():
    segments = Segments((1, 6), np.array([0, 2, 6]), np.array([[0, 0], [0, 1]]))
    mask = SegmentMask.of(segments, 3)
    assert mask.shape == (1, 1, 6, 6)
    assert "window=3" in repr(mask)
    assert isinstance(mask.detach(), SegmentMask)
    assert isinstance(mask.to("cpu", copy=True), SegmentMask)
    with pytest.warns(UserWarning, match="the mask of packed or shared rows was built"):
        added = torch.zeros(1, 1, 6, 6).masked_fill(~mask, -1.0)
    assert torch.equal(added == 0, mask.dense())
    q = torch.randn(1, 1, 6, 4)
    with pytest.warns(UserWarning, match="was built"):
        read = scaled_dot_product_attention(q, q, q, attn_mask=mask)
    torch.testing.assert_close(read.transpose(1, 2), dense(q, q, q, segments, 3))


# ---- kernels that need a GPU: what they are given, and when they are chosen -------------------------


def test_the_kernel_is_chosen_by_what_it_knows(monkeypatch):
    there = set()
    monkeypatch.setattr(by_segment, "installed", lambda: there)

    def chosen(dtype=torch.bfloat16, device="cuda", size=64, **options):
        call = {"softcap": None, "sinks": None, "dropout": 0.0} | options
        tensor = types.SimpleNamespace(
            device=torch.device(device), dtype=dtype, shape=(1, 2, 8, size)
        )
        return by_segment.choose(types.SimpleNamespace(window=None, **call), tensor, tensor)

    assert chosen() == "pieces"
    there.add("flash_attn")
    assert chosen() == chosen(softcap=5.0) == chosen(dropout=0.1) == "flash_attn"
    there.add("varlen")
    assert chosen() == "varlen"
    assert chosen(softcap=5.0) == chosen(dropout=0.1) == "flash_attn"
    for options in (
        {"device": "cpu"},
        {"dtype": torch.float32},
        {"size": 512},
        {"sinks": torch.zeros(2)},
    ):
        assert chosen(**options) == "pieces"


def by_hand(q, k, v, cu_q, cu_k, scale, window):
    """Varlen attention, causal from the bottom right."""
    outs = []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        n, m = int(b - a), int(d - c)
        behind = torch.arange(m - n, m)[:, None] - torch.arange(m)
        seen = (behind >= 0) & ((behind <= window[0]) | torch.tensor(window[0] < 0))
        groups = q.shape[1] // k.shape[1]
        keys, values = (t[c:d].repeat_interleave(groups, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * scale
        outs.append(
            torch.einsum(
                "hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), values
            )
        )
    return torch.cat(outs)


@pytest.mark.parametrize("backend", ["varlen", "flash_attn"])
@settings(deadline=None, max_examples=20)
@given(segments=layouts(), window=st.sampled_from([None, 1, 9]))
def test_varlen_kernels_are_given_the_same_segments(backend, segments, window):
    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
        assert max_q == (cu_q[1:] - cu_q[:-1]).max()
        assert max_k == (cu_k[1:] - cu_k[:-1]).max()
        return by_hand(q, k, v, cu_q, cu_k, scale, window_size)

    def flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, max_q, max_k, *, dropout_p, softmax_scale, causal, window_size, softcap
    ):
        assert causal
        return by_hand(q, k, v, cu_q, cu_k, softmax_scale, window_size)

    modules = {
        "torch.nn.attention.varlen": types.SimpleNamespace(varlen_attn=varlen_attn),
        "flash_attn": types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func),
    }
    rows, width = segments.shape
    q, k, v = (torch.randn(rows, h, width, 8) for h in (4, 2, 2))
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        got = segment_attention(q, k, v, segments, window=window, backend=backend)
    torch.testing.assert_close(got, dense(q, k, v, segments, window), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 5])
def test_flex_attention_is_given_the_same_mask(window):
    batch = pairs().plan(layout="shared", tokens_per_batch=600, shuffle=False)[0].to()
    model = use_segment_attention(llama())
    mask = batch.inputs_for(model)["attention_mask"]
    assert torch.equal(mask.dense(), batch_mask(batch))
    masks = [
        interface.block_mask(mask),
        interface.block_mask(SegmentMask.of(mask.segments, window)),
    ]
    width = batch.input_ids.shape[1]
    q, k = torch.arange(width)[:, None], torch.arange(width)
    zero = torch.zeros(1, dtype=torch.int64)
    for made, expected in zip(masks, (None, window), strict=True):
        want = SegmentMask.of(mask.segments, expected).dense()[0, 0]
        assert torch.equal(made.mask_mod(zero, zero, q, k), want)


def batch_mask(batch):
    from dpo_ext.layout.masks import dense_mask

    return dense_mask(batch)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen2ForCausalLM", "GptOssForCausalLM"])
def test_autocast_gives_what_it_gives_the_segments_alone(name):
    """Rotary positions leave queries float32 beside values of 16 bits."""
    model = attach_scoring(tiny_models.build(name)[0]).train()
    rows = torch.randint(3, 60, (2, 12))
    positions = torch.arange(12).repeat(2)[None]
    packed = {"input_ids": rows.view(1, -1), "position_ids": positions}
    found, gradients = [], []
    for inputs in (packed, {"input_ids": rows}):
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.base_model(**inputs, use_cache=False)[0].float().view(2, 12, -1)
            hidden.square().mean().backward()
        found.append(hidden.detach())
        gradients.append(model.get_input_embeddings().weight.grad.clone())
    off = (found[0] - found[1]).square().mean(-1).sqrt() / found[1].std()
    assert off.median() < 2e-2  # a token may be sent to other experts
    assert (gradients[0] - gradients[1]).abs().median() <= 5e-2 * gradients[1].abs().max()


@pytest.mark.parametrize("name", ["GptOssForCausalLM", "Qwen3MoeForCausalLM"])
def test_rounding_that_sends_a_token_to_another_expert_is_no_leak(name):
    model = attach_scoring(tiny_models.build(name)[0])
    rows = torch.randint(3, 60, (2, 12))
    positions = torch.arange(12).repeat(2)[None]
    call = {"input_ids": rows.view(1, -1), "position_ids": positions}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        interface.check_packed(model, call)
