"""`dpo-ext verify`: the same on a model that is scored rightly; what differs is named, and the code says so."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("typer")
pytest.importorskip("trl")

import trl_runs as runs
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MambaConfig

from dpo_ext import cli
from dpo_ext.bench import peers
from dpo_ext.cli import verify

ALL = (
    "ids, beside TRL's",
    "log-probs, beside own logits",
    "packed rows",
    "shared rows",
    "first step",
)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return runs.write_material(tmp_path_factory.mktemp("model"))


def run(own, *arguments, model=None, data="text_explicit") -> int:
    folder, file = str(model or own / "model"), str(own / f"{data}.jsonl")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["verify", folder, file, "--pairs", "4", *arguments])
    return stopped.value.code or 0


def states(own, tmp_path, **options) -> tuple[int, dict[str, str]]:
    out = tmp_path / "found.json"
    code = run(own, "--json", str(out), **options)
    return code, {one["name"]: one["state"] for one in json.loads(out.read_text())["checks"]}


@pytest.mark.parametrize("data", ["text_explicit", "text_implicit", "chat_explicit"])
def test_a_model_and_rows_that_are_read_rightly_are_the_same(own, data, tmp_path, capsys):
    assert states(own, tmp_path, data=data) == (0, dict.fromkeys(ALL, "same"))
    text = capsys.readouterr().out
    assert "4 of 4 pairs, id for id" in text
    assert "the loss starts at 0.693147" in text


def test_log_probs_that_are_off_are_named(own, tmp_path, monkeypatch):
    real = verify._own_logps
    monkeypatch.setattr(verify, "_own_logps", lambda *given: real(*given) + 0.01)
    code, found = states(own, tmp_path)
    assert code == 1
    assert [name for name, state in found.items() if state == "differs"] == list(ALL[1:4])


def test_ids_that_are_not_those_of_trl_are_named(own, tmp_path, monkeypatch):
    real = peers.trl_times

    def one_less(*given):
        found = real(*given)
        return peers.TrlTimes(**{**vars(found), "same": found.same - 1})

    monkeypatch.setattr(peers, "trl_times", one_less)
    assert states(own, tmp_path) == (1, {**dict.fromkeys(ALL, "same"), ALL[0]: "differs"})


def other_model(own, tmp_path, config):
    """A folder with a random model and the tokenizer of the material."""
    folder = tmp_path / "other"
    shutil.copytree(
        own / "model", folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json")
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def vocabulary(own, folder=None) -> int:
    return LlamaConfig.from_pretrained(str(folder or own / "model")).vocab_size


def test_a_model_that_reads_no_packed_rows_is_served_by_padded_batches(own, tmp_path):
    config = MambaConfig(vocab_size=vocabulary(own), hidden_size=16, num_hidden_layers=1)
    code, found = states(own, tmp_path, model=other_model(own, tmp_path, config))
    assert code == 0
    assert found == {**dict.fromkeys(ALL, "same"), **dict.fromkeys(ALL[2:4], "not compared")}


def test_dropout_is_told_with_the_loss_that_it_gives(own, tmp_path, capsys):
    config = LlamaConfig.from_pretrained(str(own / "model"))
    gpt = {"model_type": "gpt2", "vocab_size": config.vocab_size, "n_embd": 16, "n_layer": 1}
    made = AutoConfig.for_model(**gpt, n_head=2, n_positions=512, resid_pdrop=0.5)
    assert run(own, model=other_model(own, tmp_path, made)) == 0
    text = capsys.readouterr().out
    assert "dropout is on in the policy: Dropout 0.1, Dropout 0.5: the loss starts at" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "float8"), "unknown dtype `float8`\nhint: there is auto"),
        (("--tokenizer", "no/such/folder"), "no/such/folder"),
    ],
)
def test_wrong_usage_is_code_2(own, arguments, message, capsys):
    assert run(own, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_code_2(own, capsys):
    assert run(own, "--tokenizer", str(own / "model"), model="no/such/model") == 2
    assert "no/such/model: no such folder" in capsys.readouterr().err


def changed(own, tmp_path, change):
    folder = tmp_path / "changed"
    shutil.copytree(own / "model", folder)
    change(folder)
    return folder


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_head(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    weights.pop("lm_head.weight")
    save_file(weights, path, {"format": "pt"})


def of_few_positions(folder):
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "gpt2",
            vocab_size=vocabulary(folder.parent, folder),
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=8,
        )
    )
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "no causal language model on cpu: SafetensorError"),
        (without_head, "1 weights are not in it, lm_head.weight for one"),
        (of_few_positions, "the model cannot read these rows: IndexError"),
    ],
)
def test_a_folder_that_cannot_be_compared_is_code_2_and_no_traceback(
    own, tmp_path, change, message, capsys
):
    assert run(own, model=changed(own, tmp_path, change)) == 2
    assert message in capsys.readouterr().err


def test_a_device_that_is_not_there_is_code_2(own, capsys):
    assert run(own, "--device", "mars") == 2
    assert "no causal language model on mars: RuntimeError" in capsys.readouterr().err


def test_a_model_of_no_numbers_differs(own, tmp_path):
    def spoil(folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.lm_head.weight.data[:] = float("nan")
        model.save_pretrained(folder)

    code, found = states(own, tmp_path, model=changed(own, tmp_path, spoil))
    assert code == 1
    assert found == {ALL[0]: "same", "log-probs of the model": "differs"}
