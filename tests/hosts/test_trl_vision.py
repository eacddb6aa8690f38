"""Pairs about pictures: TRL prepares them, and the table of what is scored comes from its mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import trl
import trl_runs as runs
from datasets import Dataset
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from dpo_ext.trl import DPOTrainer

Image = pytest.importorskip("PIL.Image")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
TEMPLATE = (
    "{% for m in messages %}<say>{{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }}"
    "{% endfor %}{% endif %}<eos>{% endfor %}{% if add_generation_prompt %}<say>assistant {% endif %}"
)
SIZE = {"height": 16, "width": 16}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A tiny LLaVA with its processor, beside the material of the other tests."""
    out = runs.write_material(tmp_path_factory.mktemp("vision"))
    tokenizer = runs.tokenizer(out)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.padding_side = "left"
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size=SIZE, crop_size=SIZE),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    image = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16, image_size=16, patch_size=8, projection_dim=16, **sizes
        ),
        text_config=LlamaConfig(
            vocab_size=384, hidden_size=32, pad_token_id=0, initializer_range=0.2, **sizes
        ),
        image_token_index=image,
        image_token_id=image,
    )
    LlavaForConditionalGeneration(config).float().save_pretrained(out / "llava")
    processor.save_pretrained(out / "llava")
    return out


@pytest.fixture(scope="module")
def pictures():
    random = np.random.default_rng(0)

    def row(i):
        pixels = random.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        sides = {"chosen": f"it is a lamp, {i}", "rejected": f"no river holds {7 * i} of them"}
        return {
            "image": Image.fromarray(pixels),
            "prompt": [{"role": "user", "content": f"what is {i}?"}],
            **{k: [{"role": "assistant", "content": text}] for k, text in sides.items()},
        }

    return Dataset.from_list([row(i) for i in range(12)])


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_pictures_train_as_in_stock(own, pictures, layout):
    histories = []
    for kind, keywords in ((trl.DPOTrainer, {}), (DPOTrainer, {"layout": layout})):
        args = runs.config(own, max_length=None, learning_rate=1e-4)
        processor = LlavaProcessor.from_pretrained(own / "llava")
        rows = {"train_dataset": pictures, "processing_class": processor}
        trainer = kind(str(own / "llava"), args=args, **rows, **keywords)
        trainer.train()
        histories.append(runs.history(trainer))
    assert runs.differences(*histories, slack=2.0) == []
    assert trainer.steps_back.pop("layout", "") == (
        "pictures belong to rows" if layout == "packed" else ""
    )
    assert trainer.steps_back == {"data": "pictures are prepared batch by batch"}
    assert histories[0][-2]["loss"] < 0.69


def test_text_for_a_processor_is_encoded_by_trl(own):
    data = runs.load(own, "chat_explicit")
    histories = []
    for kind in (trl.DPOTrainer, DPOTrainer):
        args = runs.config(own, learning_rate=1e-4)
        processor = LlavaProcessor.from_pretrained(own / "llava")
        rows = {"train_dataset": data, "processing_class": processor}
        trainer = kind(str(own / "llava"), args=args, **rows)
        trainer.train()
        histories.append(runs.history(trainer))
    assert runs.differences(*histories, slack=2.0) == []
    assert trainer.steps_back == {"data": "LlavaProcessor is a processor"}
