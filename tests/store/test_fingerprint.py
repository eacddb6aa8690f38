"""The fingerprint of a reference: what moves it, what does not, and what is refused."""

import json
import os
import shutil
import struct
import time

import numpy as np
import pytest
import tiny
from reflogps_cases import opened, pairs_and_values, same

from dpo_ext import RefLogpsError
from dpo_ext.reflogps import fingerprint
from dpo_ext.store import notes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache, where digests are noted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dpo_ext" / "parameters"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "reference"
    tiny.model().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made, tmp_path / "reference")
    return tmp_path / "reference"


def peft_model(seed=3, **options):
    peft = pytest.importorskip("peft")
    settings = {"target_modules": ["q_proj", "v_proj"], "r": 4, "init_lora_weights": False}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(tiny.model(), peft.LoraConfig(**{**settings, **options}))


def edit_config(folder, name="config.json", **changes):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors.load_file(path)
    change(tensors)
    safetensors.save_file(tensors, path)


# One reference, however it is given


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_and_the_model_from_it_are_one_reference(tmp_path, tied):
    model = tiny.model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 3
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    first = fingerprint(model)
    for other in (tmp_path / "whole", str(tmp_path / "parts"), loaded, loaded.train()):
        assert first.differences(fingerprint(other)) == []
        assert first.digest == fingerprint(other).digest


def test_a_wrapped_model_is_the_same():
    from dpo_ext.torch import attach_scoring

    plain = fingerprint(tiny.model())
    model = attach_scoring(tiny.model())  # which may attend by another function: a soft part
    for wrapped in (model, torch.nn.DataParallel(model), torch.compile(model)):
        assert fingerprint(wrapped).differences(plain) == []
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert fingerprint(model).digest == plain.digest


def test_a_copy_and_another_file_order_are_the_same(folder, tmp_path):
    first = fingerprint(folder)
    shutil.copytree(folder, tmp_path / "copy")
    edit_tensors(tmp_path / "copy", lambda tensors: tensors.update(reversed(list(tensors.items()))))
    assert fingerprint(tmp_path / "copy") == first


def test_an_adapter_in_memory_and_in_its_folder_are_one(folder, tmp_path):
    model = peft_model(modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    on, off = fingerprint(model), fingerprint(model, adapter=False)
    assert on.differences(fingerprint(folder, adapter=tmp_path / "adapter")) == []
    assert off.differences(fingerprint(folder)) == []
    assert [line.partition(":")[0] for line in on.differences(off)] == ["`adapter`"]


def test_training_an_adapter_leaves_the_base_and_moves_the_whole():
    model = peft_model()
    on, off = fingerprint(model), fingerprint(model, adapter=False)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).add_(1)
    assert fingerprint(model, adapter=False) == off
    assert "`adapter.active.parameters`" in fingerprint(model).differences(on)[0]


# What moves it


def bump(tensors):
    tensors["model.norm.weight"].view(-1)[3] += 2**-12


def rename(tensors):
    tensors["model.norm.w"] = tensors.pop("model.norm.weight")


def reshape(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].reshape(1, -1)


def cast(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()


def bits(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].view(torch.int32)


def swap(tensors):
    a, b = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    tensors[a], tensors[b] = tensors[b].clone(), tensors[a].clone()


IN_THE_FILE = {
    "one bit of a parameter": (bump, "parameters"),
    "a name": (rename, "parameters"),
    "a shape": (reshape, "parameters"),
    "a dtype": (cast, "dtype"),
    "a dtype of the same bytes": (bits, "parameters"),
    "two layers exchanged": (swap, "parameters"),
    "a tensor more": (lambda tensors: tensors.update(extra=torch.zeros(1)), "parameters"),
    "a tensor less": (lambda tensors: tensors.pop("lm_head.weight"), "parameters"),
}
IN_THE_CONFIG = {
    "rope_theta": 5e5,
    "rms_norm_eps": 1e-3,
    "hidden_act": "gelu",
    "num_attention_heads": 2,
    "sliding_window": 8,
    "layer_types": ["full_attention", "sliding_attention"],
    "final_logit_softcapping": 30.0,
    "logit_scale": 0.5,
    "tie_word_embeddings": True,
    "max_position_embeddings": 10,
    "quantization_config": {"load_in_4bit": True},
    "architectures": ["MistralForCausalLM"],
}
IN_THE_CALL = {
    "dtype": {"dtype": torch.bfloat16},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 30.0},
    "logit_scale": {"logit_scale": 0.5},
    "epoch": {"epoch": 1},
    "max_length": {"max_length": 512},
    "truncation": {"truncation": "keep_end"},
}


@pytest.mark.parametrize("name", IN_THE_FILE)
def test_a_change_of_the_parameters_moves_it(folder, name):
    first = fingerprint(folder)
    change, part = IN_THE_FILE[name]
    edit_tensors(folder, change)
    second = fingerprint(folder)
    assert any(line.startswith(f"`{part}`") for line in second.differences(first))
    assert second.digest != first.digest


@pytest.mark.parametrize("name", IN_THE_CONFIG)
def test_a_change_of_the_configuration_moves_it(folder, name):
    first = fingerprint(folder)
    edit_config(folder, **{name: IN_THE_CONFIG[name]})
    (line,) = fingerprint(folder).differences(first)
    part = {"architectures": "architecture", "quantization_config": "quantization"}.get(name)
    assert line.startswith(f"`{part or f'config.{name}'}`: ")


def test_the_order_of_layers_in_a_configuration_moves_it(folder):
    kinds = ["full_attention", "sliding_attention"]
    edit_config(folder, layer_types=kinds)
    first = fingerprint(folder)
    edit_config(folder, layer_types=kinds[::-1])
    assert fingerprint(folder) != first


@pytest.mark.parametrize("name", IN_THE_CALL)
def test_what_is_said_by_hand_moves_it(folder, name):
    (line,) = fingerprint(folder, **IN_THE_CALL[name]).differences(fingerprint(folder))
    assert name in line


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 32},
        {"r": 8},
        {"use_rslora": True},
        {"use_dora": True},
        {"seed": 4},
        {"target_modules": ["q_proj"]},
        {"bias": "all"},
    ],
)
def test_a_change_of_the_adapter_moves_it(options):
    first, second = fingerprint(peft_model()), fingerprint(peft_model(**options))
    assert all(line.startswith("`adapter.active.") for line in second.differences(first))
    assert second.digest != first.digest


def test_another_tokenizer_moves_it_where_it_is_asked_for(folder, tmp_path):
    from byte_tokenizer import tokenizer

    tokenizer(tmp_path / "a", config={"bos_token": "<|bos|>"})
    tiny.tokenizer().save_pretrained(tmp_path / "b")
    without, a, b = (
        fingerprint(folder, **kw)
        for kw in ({}, {"tokenizer": tmp_path / "a"}, {"tokenizer": tmp_path / "b"})
    )
    assert [line.partition(":")[0] for line in a.differences(b)] == ["`tokenizer`"]
    assert [line.partition(":")[0] for line in a.differences(without)] == ["`tokenizer`"]


def test_a_plain_module_is_told_by_its_print_and_its_parameters():
    def module(eps=1e-5, inplace=1.0):
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Embedding(9, 4), torch.nn.LayerNorm(4, eps=eps), torch.nn.Linear(4, 9)
        )

    first = fingerprint(module())
    assert fingerprint(module()) == first
    assert [line[:8] for line in fingerprint(module(eps=1e-6)).differences(first)] == ["`config`"]


# What does not


@pytest.mark.parametrize(
    "name",
    [
        "_name_or_path",
        "attention_dropout",
        "dtype",
        "initializer_range",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ],
)
def test_what_changes_no_value_in_eval_mode_does_not_move_it(folder, name):
    first = fingerprint(folder)
    edit_config(folder, **{name: "changed"})
    assert fingerprint(folder) == first


@pytest.mark.parametrize(
    "name", ["beta", "learning_rate", "lr", "batch_size", "layout", "packing", "seed", "loss_type"]
)
def test_on_what_no_log_prob_depends_is_refused(folder, name):
    with pytest.raises(TypeError, match=f"`{name}` is no part of a fingerprint"):
        fingerprint(folder, **{name: 1})


def test_attention_is_a_soft_part_that_warns(folder, tmp_path):
    pairs, values = pairs_and_values(5)
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name)
        for name in ("sdpa", "eager")
    ]
    sdpa, eager = map(fingerprint, models)
    assert sdpa.digest == eager.digest == fingerprint(folder).digest
    opened(tmp_path / "s", sdpa).put(pairs, values)
    with pytest.warns(UserWarning, match="`attention`: eager, and sdpa in the other"):
        assert same(opened(tmp_path / "s", eager).get(pairs), values)
    assert same(opened(tmp_path / "s", fingerprint(folder)).get(pairs), values)
    with pytest.warns(UserWarning, match="`attention`"):
        opened(tmp_path / "s", fingerprint(folder, attention="flash_attention_2"))


def test_a_store_made_for_another_model_says_which_part_differs(folder, tmp_path):
    pairs, values = pairs_and_values(5)
    opened(tmp_path / "s", fingerprint(folder)).put(pairs, values)
    with pytest.raises(
        RefLogpsError, match=r"another reference\n  `parameters`: \w{16}\.\.\., and"
    ):
        opened(tmp_path / "s", fingerprint(tiny.model(seed=1)))
    with pytest.raises(RefLogpsError, match=r"`head\.temperature`: 0\.7, and 1\.0 in the other"):
        opened(tmp_path / "s", fingerprint(folder, temperature=0.7))


# Files are read once


@pytest.fixture
def reads(monkeypatch):
    """The files whose tensors were digested, one entry a time."""
    from dpo_ext.reflogps import parameters

    calls = []
    real = parameters._digests

    def counted(fd, size):
        calls.append(size)
        return real(fd, size)

    counted.__module__, counted.__qualname__ = real.__module__, real.__qualname__
    monkeypatch.setattr(parameters, "_digests", counted)
    monkeypatch.setattr(notes, "RACY_NS", -(10**15))  # note the digest at once
    return calls


def test_a_file_is_read_once_and_a_copy_again(folder, tmp_path, reads, cache):
    first = fingerprint(folder)
    assert fingerprint(folder) == first
    folder.rename(tmp_path / "moved")
    assert fingerprint(tmp_path / "moved") == first
    assert len(reads) == 1
    assert len(list(cache.iterdir())) == 1
    shutil.copytree(tmp_path / "moved", tmp_path / "copy")  # the times of the file are copied
    assert fingerprint(tmp_path / "copy") == first
    assert len(reads) == 2


def test_a_file_that_changed_under_its_name_size_and_time_is_read_again(folder, reads):
    first = fingerprint(folder)
    path = folder / "model.safetensors"
    before = path.stat()
    time.sleep(0.02)
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert fingerprint(folder).differences(first)[0].startswith("`parameters`")
    assert len(reads) == 2


def test_a_file_of_this_moment_or_of_the_future_is_not_noted(folder, reads, monkeypatch, cache):
    monkeypatch.setattr(notes, "RACY_NS", 2_000_000_000)
    fingerprint(folder)
    assert not cache.exists()
    monkeypatch.setattr(time, "time_ns", lambda: 0)  # the clock was set back
    fingerprint(folder)
    assert not cache.exists()
    assert len(reads) == 2


def test_a_damaged_note_is_no_note(folder, reads, cache):
    first = fingerprint(folder)
    (note,) = cache.iterdir()
    good = note.read_bytes()
    for bad in (b"", good[:-5], good.replace(b"F32", b"F16"), b"\xff" * 100):
        note.write_bytes(bad)
        assert fingerprint(folder) == first
    assert len(reads) == 5
    assert note.read_bytes() == good


@pytest.mark.parametrize("place", ["none", "file", "no home"])
def test_where_nothing_can_be_noted_files_are_read_each_time(
    folder, tmp_path, reads, place, monkeypatch
):
    options = {}
    if place == "none":
        options = {"notes": False}
    elif place == "file":
        (tmp_path / "file").write_text("x")
        options = {"notes": tmp_path / "file"}
    else:
        from pathlib import Path

        def no_home():
            raise RuntimeError("no home")

        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
    assert fingerprint(folder, **options) == fingerprint(folder, **options)
    assert len(reads) == 2


# What is refused


def test_damaged_safetensors_are_refused(folder):
    path = folder / "model.safetensors"
    good = path.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])

    def header(change):
        said = json.loads(good[8 : 8 + length])
        change(said)
        text = json.dumps(said).encode()
        return struct.pack("<Q", len(text)) + text + good[8 + length :]

    def norm(**changes):
        return header(lambda said: said["model.norm.weight"].update(changes))

    for bad in (
        b"",
        good[:7],
        good[:-1],
        good + b"\0",
        struct.pack("<Q", 2**63) + good[8:],
        good[:8] + b"[" * length + good[8 + length :],
        norm(shape=[63]),
        norm(shape=[-1, -64]),
        norm(dtype="F64"),
        norm(data_offsets=[0, len(good)]),
        norm(data_offsets=[256, 0]),
        norm(data_offsets="ab"),
        header(lambda said: said.update(x=3)),
    ):
        path.write_bytes(bad)
        with pytest.raises(RefLogpsError, match=r"model\.safetensors: expected safetensors"):
            fingerprint(folder)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ((), "expected model.safetensors or model.safetensors.index.json, found neither"),
        (("adapter_config.json",), "hint: this is an adapter; give the folder of its base"),
        (("pytorch_model.bin",), "hint: save the model with `save_pretrained`"),
    ],
)
def test_a_folder_without_parameters_is_refused(tmp_path, files, said):
    for name in ("config.json", *files):
        (tmp_path / name).write_text("{}")
    with pytest.raises(RefLogpsError) as refused:
        fingerprint(tmp_path)
    assert said in str(refused.value)


def test_a_folder_with_a_model_and_an_adapter_is_ambiguous(folder, tmp_path):
    plain = fingerprint(folder)
    peft_model().save_pretrained(folder)
    with pytest.raises(RefLogpsError, match="expected a model, found one and an adapter"):
        fingerprint(folder)
    assert fingerprint(folder, adapter=False) == plain
    assert fingerprint(folder, adapter=folder).differences(plain)[0].startswith("`adapter`")


def test_the_code_that_a_model_brings_moves_it(folder):
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling.Own"})
    (folder / "modeling.py").write_text("class Own: scale = 1")
    first = fingerprint(folder)
    (folder / "modeling.py").write_text("class Own: scale = 2")
    (line,) = fingerprint(folder).differences(first)
    assert line.startswith("`code.modeling.py`")


def test_one_file_goes_before_an_index_as_in_transformers(folder):
    first = fingerprint(folder)
    index = {"weight_map": {"a": "none.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fingerprint(folder) == first


def test_an_index_that_leads_out_of_the_folder_is_refused(folder):
    index = {"weight_map": {"a": "../model.safetensors"}}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RefLogpsError, match="expected names of files in the folder"):
        fingerprint(folder)


def test_a_configuration_that_is_none_is_refused(folder):
    for text in ("", "[]", "{", "\0"):
        (folder / "config.json").write_text(text)
        with pytest.raises(RefLogpsError, match=r"config\.json: expected"):
            fingerprint(folder)


def test_a_model_that_is_not_in_memory_is_refused():
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
    with pytest.raises(RefLogpsError, match="`weight` is not in memory"):
        fingerprint(model)


@pytest.mark.parametrize("reference", [None, 3, {}, np.zeros(3)])
def test_what_is_no_reference_is_refused(reference):
    with pytest.raises(TypeError, match="`reference` must be a model or a folder"):
        fingerprint(reference)


def test_places_that_are_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        fingerprint(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError):
        fingerprint(tmp_path / "file")


def test_an_adapter_where_there_is_none_is_refused(folder):
    with pytest.raises(TypeError, match="the model has no adapter"):
        fingerprint(tiny.model(), adapter=True)
    with pytest.raises(TypeError, match="must be the folder of the adapter"):
        fingerprint(folder, adapter=True)
    with pytest.raises(TypeError, match="must be False, or left out"):
        fingerprint(tiny.model(), adapter="folder")
    with pytest.raises(FileNotFoundError):
        fingerprint(folder, adapter=folder)


def test_a_part_that_is_worked_out_is_not_given_by_hand(folder):
    with pytest.raises(TypeError, match="`parameters` is a part that `fingerprint` works out"):
        fingerprint(folder, parameters="ab")
