"""Every class of transformers with a head over text, as tiny as its configuration allows, with large random weights."""

from __future__ import annotations

import contextlib
import gc
import warnings

import torch
import transformers
from transformers.models.auto import modeling_auto

V = 64
SIZES = {
    "vocab_size": V, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "intermediate_size": 48, "ffn_dim": 48, "d_ff": 48, "n_inner": 48,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2, "num_attention_heads": 4,
    "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4, "encoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "is_decoder": True,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "moe_num_experts": 4, "moe_topk": 2, "shared_expert_intermediate_size": 16,
}  # fmt: skip
HEADS = {"head_dim": 8}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}  # fmt: skip
# Tried in turn, as no sizes suit all families.
VARIANTS = (
    SIZES | HEADS | LATENT,
    SIZES | HEADS,
    SIZES,
    SIZES | LATENT,
    SIZES | {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "num_hidden_layers": 4},
)
NAMED = [
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
    "CohereForCausalLM", "Cohere2ForCausalLM", "GraniteForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "OPTForCausalLM",
    "BloomForCausalLM", "FalconForCausalLM", "MptForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM", "StableLmForCausalLM",
    "Olmo2ForCausalLM", "MixtralForCausalLM", "Qwen2MoeForCausalLM", "RobertaForCausalLM", "BertLMHeadModel", "ElectraForCausalLM",
    "ModernBertDecoderForCausalLM", "Llama4ForCausalLM", "MambaForCausalLM", "xLSTMForCausalLM", "Kosmos2_5ForConditionalGeneration",
    "LlavaForConditionalGeneration", "Cohere2VisionForConditionalGeneration", "T5ForConditionalGeneration", "BartForConditionalGeneration",
]  # fmt: skip
# Larger ones take too long, or too much memory, for what they show.
MOST_PARAMETERS = 60e6


class Unbuilt(Exception):  # noqa: N818
    """No tiny configuration of this class is known, or it does not read text alone."""


def names():
    """Classes that `AutoModelForCausalLM`, `...ImageTextToText` and `...Seq2SeqLM` give."""
    kinds = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM")
    found = set()
    for kind in kinds:
        for value in getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").values():
            found.update([value] if isinstance(value, str) else value)
    return sorted(name for name in found if hasattr(transformers, name))


def inside(config):
    """The configurations within a configuration."""
    return [v for v in vars(config).values() if isinstance(v, transformers.PretrainedConfig)]


def fill(config, sizes, depth=0):
    for name, value in sizes.items():
        if hasattr(config, name):
            with contextlib.suppress(Exception):
                setattr(config, name, value)
    for one in inside(config) if depth < 3 else ():
        fill(one, sizes, depth + 1)
    return config


def configurations(kind):
    for sizes in VARIANTS:
        with contextlib.suppress(Exception):
            base = kind()
            known = {name: value for name, value in sizes.items() if hasattr(base, name)}
            config = kind(**known)
            for one in inside(config):
                fill(one, sizes)
            yield config
        with contextlib.suppress(Exception):
            yield fill(kind(), sizes)


def batch(model):
    """Inputs of two pairs, and their labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V - 4, (4, 9), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.roll(ids, 1, dims=1)
    return inputs, labels


def right(model):
    """(logits of the model's own forward in float64, log-probs of the pairs by hand)."""
    inputs, labels = batch(model)
    with torch.no_grad():
        try:
            logits = model(**inputs).logits.double()
        except Exception:  # hybrids want a cache of their own, or none
            logits = model(**inputs, use_cache=False).logits.double()
    shift = 0 if model.config.is_encoder_decoder else 1
    logps = logits[:, : 9 - shift].log_softmax(-1)
    mask = labels[:, shift:] != -100
    picked = logps.gather(-1, labels[:, shift:].clamp(min=0)[..., None])[..., 0]
    return torch.stack((picked * mask).sum(1).chunk(2), 1)


def build(name):
    """A model of this class that runs, and the log-probs that are right.

    Raises:
        Unbuilt: there is none.
    """
    cls = getattr(transformers, name)
    why = "no configuration"
    for config in configurations(cls.config_class):
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with torch.device("meta"):
                    size = sum(p.numel() for p in cls(config).parameters())
                if size > MOST_PARAMETERS:
                    why = f"{size / 1e6:.0f} million parameters"
                    continue
                model = cls(config).eval().float()
                with torch.no_grad():
                    for p in model.parameters():
                        if p.dim() >= 2:
                            p.mul_(3.0)
                        elif p.is_floating_point():
                            p.add_(0.1 * torch.randn_like(p))
                return model, right(model)
        except Exception as error:
            why = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
            gc.collect()
    raise Unbuilt(why)
