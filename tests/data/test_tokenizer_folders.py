"""A folder gives the ids, special ids, named tokens and chats of transformers 5, by its own files or through
transformers; so does the live tokenizer of the same folder."""

import json
import pickle
import sys

import folders
import pytest
from byte_tokenizer import write_folder
from folders import added, decoder_entry

from dpo_ext import PairDataset, Tokenizer, TokenizerError

# AutoTokenizer reads each folder, too.
pytestmark = pytest.mark.slow

END = "<|endoftext|>"
TEXTS = folders.nasty_texts()
CHAT = [{"role": "user", "content": "the <image> <|end|>"}, {"role": "assistant", "content": "a"}]
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
CONFIG = "tokenizer_config.json"


def config(kind="PreTrainedTokenizerFast", **keys):
    return {CONFIG: {"tokenizer_class": kind, "chat_template": folders.TEMPLATE, **keys}}


def of_model(model, **keys):
    return {
        CONFIG: {"chat_template": folders.TEMPLATE, **keys},
        "config.json": {"model_type": model},
    }


MAP = {
    "bos_token": END,
    "eos_token": {"content": "<|end|>", "lstrip": True, "rstrip": False, "normalized": False,
                  "single_word": False},
    "pad_token": "<|pad|>",
}  # fmt: skip
DECODER = {
    "256": decoder_entry("<|pad|>"),
    "257": decoder_entry("<|turn|>", special=False, normalized=True),
    "258": decoder_entry("<|end|>", lstrip=True, rstrip=True),
    "259": decoder_entry("<|bos|>"),
}
FURTHER = DECODER | {
    "270": decoder_entry("<new>"),
    "271": decoder_entry("<more>", special=False, normalized=True, single_word=True),
}

# name: (tokenizer, files, whether our own loader knows it)
OWN = {
    "bare": (folders.split, {}),
    "config without a class": (folders.split, {CONFIG: {"eos_token": "<|end|>"}}),
    "plain class": (folders.split, config(**PLAIN)),
    "TokenizersBackend": (folders.bos, config("TokenizersBackend", eos_token="<|end|>")),
    "null tokens": (folders.gpt2, config("GPT2Tokenizer", bos_token=None, unk_token=None)),
    "special map": (folders.split, config() | {"special_tokens_map.json": MAP}),
    "special map over config": (
        folders.split,
        config(eos_token="<|turn|>", sep_token="<x>") | {"special_tokens_map.json": MAP},
    ),
    "special map beside a decoder": (
        folders.split,
        config(added_tokens_decoder=DECODER) | {"special_tokens_map.json": MAP},
    ),
    "special map with names and extras": (
        folders.split,
        config()
        | {
            "special_tokens_map.json": MAP
            | {
                "image_token": "<image>",
                "boi_token": {
                    "content": "<boi>",
                    "rstrip": True,
                    "lstrip": False,
                    "normalized": False,
                    "single_word": False,
                },
                "additional_special_tokens": ["<x>", "<|turn|>"],
                "pad_token": None,
            }
        },
    ),
    "special map with extras of objects": (
        folders.split,
        config(extra_special_tokens=["<new>"])
        | {
            "special_tokens_map.json": {
                "extra_special_tokens": [
                    "<new>",
                    {
                        "content": "<x>",
                        "lstrip": True,
                        "rstrip": False,
                        "normalized": False,
                        "single_word": False,
                    },
                ]
            }
        },
    ),
    "special map with an object of extras": (
        folders.split,
        config()
        | {"special_tokens_map.json": {"extra_special_tokens": {"image_token": "<image>"}}},
    ),
    "added tokens": (
        folders.split,
        config() | {"added_tokens.json": {"<more>": 271, "<new>": 270}},
    ),
    "added tokens that are special": (
        folders.split,
        config(additional_special_tokens=["<new>"], sep_token="<x>")
        | {"added_tokens.json": {"<x>": 270, "<new>": 271, "hello": 268}},
    ),
    "decoder flags": (folders.split, config(added_tokens_decoder=DECODER, eos_token="<|end|>")),
    "decoder names a plain token": (
        folders.split,
        config(added_tokens_decoder=DECODER, eos_token="<|turn|>"),
    ),
    "decoder adds": (folders.bos, config(added_tokens_decoder=FURTHER, sep_token="<more>")),
    "decoder without the file's": (
        folders.split,
        config(added_tokens_decoder={"300": decoder_entry("<new>", rstrip=True)}),
    ),
    "extra list": (
        folders.split,
        config(extra_special_tokens=["<image>", added("<x>", lstrip=True)]),
    ),
    "extra object": (
        folders.split,
        config(
            extra_special_tokens={
                "image_token": "<image>",
                "boi_token": added("<boi>", rstrip=True),
            }
        ),
    ),
    "empty extra object": (
        folders.split,
        config(extra_special_tokens={}, additional_special_tokens=["<image>"]),
    ),
    "additional": (folders.split, config(additional_special_tokens=["<image>", added("<x>")])),
    "additional and extra list": (
        folders.split,
        config(additional_special_tokens=["<image>"], extra_special_tokens=["<x>"]),
    ),
    "additional and extra object": (
        folders.split,
        config(additional_special_tokens=["<image>"], extra_special_tokens={"x_token": "<x>"}),
    ),
    "named tokens": (
        folders.split,
        config(image_token="<image>", audio_token=added("<audio>", rstrip=True), x_token=None),
    ),
    "named twice with other flags": (
        folders.split,
        config(
            bos_token=added("<x>", lstrip=True),
            eos_token="<x>",
            mask_token=added("<x>", rstrip=True),
        ),
    ),
    "specific tokens": (
        folders.split,
        config(model_specific_special_tokens={"video_token": "<video>"}),
    ),
    "split special": (folders.split, config(split_special_tokens=True, **PLAIN)),
    "split special and more": (
        folders.bos,
        config(
            split_special_tokens=True,
            added_tokens_decoder=FURTHER | {"257": decoder_entry("<|turn|>", lstrip=True)},
        ),
    ),
    "split special by the crate": (
        folders.words,
        config(split_special_tokens=True, bos_token="<s>"),
    ),
    "padding of the file": (folders.padded, config()),
    "padding of the file and of the config": (folders.padded, config(pad_token=None)),
    "ignored keys": (
        folders.split,
        config(
            add_bos_token=True,
            add_eos_token=True,
            add_prefix_space=True,
            do_lower_case=True,
            legacy=False,
            clean_up_tokenization_spaces=True,
            model_max_length=7,
            **PLAIN,
        ),
    ),
    "GPT2": (folders.gpt2, config("GPT2Tokenizer", model_max_length=1024)),
    "GPT2Fast": (folders.gpt2, config("GPT2TokenizerFast", pad_token="<|pad|>", errors="replace")),
    "gpt2 by its model": (folders.gpt2, of_model("gpt2", model_max_length=1024)),
    "gpt2 with padding in the file": (
        lambda: folders.gpt2() | {"padding": folders.padded()["padding"]},
        config("GPT2Tokenizer"),
    ),
    "opt by its model": (folders.gpt2, of_model("opt", bos_token="<|bos|>")),
    "class of the model's config": (
        folders.gpt2,
        {"config.json": {"model_type": "foo", "tokenizer_class": "GPT2Tokenizer"}},
    ),
    "GPT2 decoder": (folders.gpt2, config("GPT2Tokenizer", added_tokens_decoder=FURTHER)),
    "GPTNeoX": (folders.neox, config("GPTNeoXTokenizerFast")),
    "neox by its model": (folders.neox, of_model("olmo", eos_token="<|end|>")),
    "Qwen2": (folders.qwen2, config("Qwen2Tokenizer", eos_token="<|end|>", bos_token=None)),
    "Qwen2 with flags": (
        folders.qwen2,
        config(
            "Qwen2TokenizerFast",
            added_tokens_decoder=DECODER,
            eos_token="<|end|>",
            additional_special_tokens=["<|turn|>", "<image>"],
            split_special_tokens=False,
        ),
    ),
    "qwen2 whatever its class": (
        folders.qwen2,
        config("PreTrainedTokenizerFast") | {"config.json": {"model_type": "qwen2"}},
    ),
    "Llama": (folders.llama, config("LlamaTokenizer", legacy=False)),
    "LlamaFast": (
        folders.llama,
        config(
            "LlamaTokenizerFast",
            added_tokens_decoder={
                "0": decoder_entry("<unk>"),
                "1": decoder_entry("<s>"),
                "2": decoder_entry("</s>", rstrip=True),
            },
        ),
    ),
    "Llama over bytes": (folders.bos, config("LlamaTokenizerFast", eos_token="<|end|>")),
    "Llama of a mistral": (
        folders.old_llama,
        config("LlamaTokenizer") | {"config.json": {"model_type": "mistral"}},
    ),
    "Llama of phi3": (
        folders.old_llama,
        config("LlamaTokenizer") | {"config.json": {"model_type": "phi3"}},
    ),
    "Gemma": (folders.gemma, config("GemmaTokenizer")),
    "gemma by its model": (folders.gemma, of_model("gemma2", eos_token="<eos>")),
    "Gemma by a plain class": (folders.gemma, config(eos_token="<eos>")),
    "T5 by a plain class": (folders.t5, config(eos_token="</s>", unk_token="<unk>")),
    "BERT by a plain class": (folders.bert, config(cls_token="[CLS]", unk_token="[UNK]")),
    "words": (folders.words, config(unk_token="[UNK]", bos_token="<s>")),
    "template files": (
        folders.split,
        config(**PLAIN)
        | {"chat_template.jinja": "{{ eos_token }}!", "additional_chat_templates/rag.jinja": "rag"},
    ),
}
FOREIGN = {
    "unknown key": (folders.split, config(fix_mistral_regex=False), "`fix_mistral_regex`"),
    "unknown class": (folders.split, config("NobodysTokenizer"), "the class NobodysTokenizer"),
    "GPT2 with a prefix": (
        folders.gpt2, config("GPT2Tokenizer", add_prefix_space=True), "GPT2Tokenizer, .*pre_tokenizer",
    ),
    "GPT2 over a split": (folders.split, config("GPT2Tokenizer"), "replaces the pre_tokenizer"),
    "GPT2 over a normalizer": (folders.neox, config("GPT2Tokenizer"), "replaces the normalizer"),
    "GPT2 that drops a token": (
        folders.gpt2,
        config("GPT2Tokenizer", added_tokens_decoder={"256": decoder_entry("<|pad|>")}),
        "does not add the tokens",
    ),
    "GPTNeoX with a BOS": (
        lambda: folders.neox() | {"post_processor": folders.bos()["post_processor"]},
        config("GPTNeoXTokenizer"),
        "replaces the post_processor",
    ),
    "Qwen2 over another regex": (folders.split, of_model("qwen2"), "Qwen2Tokenizer, .*normalizer"),
    "old Llama": (folders.old_llama, config("LlamaTokenizerFast"), "LlamaTokenizer, .*normalizer"),
    "Llama without a prefix": (
        folders.llama, config("LlamaTokenizer", add_prefix_space=False), "pre_tokenizer",
    ),
    "legacy Llama": (folders.llama, config("LlamaTokenizer", legacy=True), "pre_tokenizer"),
    "CodeLlama": (folders.old_llama, config("CodeLlamaTokenizerFast"), "the class CodeLlamaTok"),
    "Gemma over Llama": (folders.old_llama, config("GemmaTokenizer"), "GemmaTokenizer, .*normalizer"),
    "T5": (folders.t5, config("T5Tokenizer", extra_ids=3), "T5Tokenizer"),
    "t5 by its model": (folders.t5, of_model("t5"), "`model_type` t5"),
    "BERT": (folders.bert, config("BertTokenizer", do_lower_case=True), "the class BertTokenizer"),
    "RoBERTa": (
        folders.gpt2, config("RobertaTokenizer", add_prefix_space=True), "the class RobertaTokenizer",
    ),
    "Cohere": (folders.neox, config("CohereTokenizerFast"), "the class CohereTokenizer"),
    "map that sets a switch": (
        folders.split, config() | {"special_tokens_map.json": {"legacy": True}}, "`legacy`",
    ),
}  # fmt: skip
CASES = {**OWN, **{name: case[:2] for name, case in FOREIGN.items()}}


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = pytest.importorskip("transformers")
    found.utils.logging.set_verbosity_error()
    return found


@pytest.fixture
def folder(request, tmp_path):
    made, files = CASES[request.param]
    return folders.write(tmp_path / "folder", made(), files)


def assert_same(ours, theirs):
    """Ids, special ids, named tokens, a chat."""
    for special in (True, False):
        want = theirs(TEXTS, add_special_tokens=special)["input_ids"]
        got = ours.encode_batch(TEXTS, add_special_tokens=special).tolist()
        for text, theirs_ids, our_ids in zip(TEXTS, want, got, strict=True):
            assert our_ids == theirs_ids, text
    names = ("bos", "eos", "pad")
    want = [getattr(theirs, f"{name}_token_id") for name in names]
    assert [getattr(ours, f"{name}_id") for name in names] == want
    if theirs.chat_template is not None:
        chat = theirs.apply_chat_template(CHAT, tokenize=False)
        assert ours.apply_chat_template(CHAT) == chat
        ids = theirs(chat, add_special_tokens=False)["input_ids"]
        assert ours.encode(chat, add_special_tokens=False).tolist() == ids


@pytest.mark.slow
@pytest.mark.parametrize("folder", CASES, indirect=True)
def test_folder_and_live_tokenizer_are_transformers(folder, request, transformers):
    five = int(transformers.__version__.split(".")[0]) >= 5
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception:
        # Transformers 4 refuses some of what 5 reads; ours reads it where it does so by itself.
        if five:
            raise
        if request.node.callspec.params["folder"] in OWN:
            assert Tokenizer.from_pretrained(folder).encode("the").size
            return
        with pytest.raises(TokenizerError, match="does not load it"):
            Tokenizer.from_pretrained(folder)
        return
    live = Tokenizer.from_pretrained(theirs)
    assert_same(live, theirs)
    ours = Tokenizer.from_pretrained(folder)
    if five or any("read by" in note for note in ours.notes):
        assert_same(ours, theirs)
        assert_same(pickle.loads(pickle.dumps(ours)), theirs)
        assert ours.vocab_size == live.vocab_size


def test_there_are_folders_enough():
    assert len(CASES) >= 70


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)


@pytest.mark.parametrize("folder", OWN, indirect=True)
def test_a_known_folder_needs_no_transformers(folder, alone):
    assert not any("read by" in note for note in Tokenizer.from_pretrained(folder).notes)


@pytest.mark.parametrize(
    ("folder", "why"), [(name, case[2]) for name, case in FOREIGN.items()], indirect=["folder"]
)
def test_without_transformers_an_unknown_folder_says_what_and_what_to_install(folder, why, alone):
    with pytest.raises(TokenizerError, match=f"(?s)only transformers knows .*{why}.*hf") as caught:
        Tokenizer.from_pretrained(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.slow
def test_what_transformers_read_is_said_once(tmp_path, transformers):
    folder = folders.write(tmp_path / "folder", folders.t5(), config("T5Tokenizer"))
    ours = Tokenizer.from_pretrained(folder)
    said = [note for note in ours.notes if "read by transformers" in note]
    assert len(said) == 1
    assert "the class T5Tokenizer" in said[0]
    assert ours.engine == "tokenizers"
    assert ours.with_chat_template("{{ messages[0].content }}").notes[0] == said[0]


VOCABULARIES = ("tokenizer.model", "tekken.json", "qwen.tiktoken", "vocab.txt", "spiece.model")


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_vocabulary_alone_says_what_to_install(tmp_path, name, alone):
    (tmp_path / name).write_text("no vocabulary")
    with pytest.raises(TokenizerError, match=f"`{name}` without a tokenizer.json\nhint: .*hf"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_vocabulary_that_transformers_cannot_read_is_an_error(tmp_path, name, transformers):
    (tmp_path / name).write_text("no vocabulary")
    (tmp_path / CONFIG).write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(
        TokenizerError,
        match=r"(?s)transformers.*(does not load it: .*hint|LlamaTokenizer reads no file)",
    ):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.slow
def test_a_vocabulary_alone_is_read_through_transformers(tmp_path, transformers):
    made = folders.gpt2()
    for name in ("<|pad|>", "<|turn|>", "<|end|>", "<|bos|>"):
        del made["model"]["vocab"][name]
    made["model"]["vocab"] = {t: i for i, t in enumerate(made["model"]["vocab"])}
    (tmp_path / "vocab.json").write_text(json.dumps(made["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(made["model"]["merges"]))
    (tmp_path / CONFIG).write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    ours = Tokenizer.from_pretrained(tmp_path)
    assert_same(ours, theirs)
    assert "`vocab.json` without a tokenizer.json" in ours.notes[0]


@pytest.mark.slow
def test_code_of_a_folder_never_runs(tmp_path, transformers):
    folder = folders.write(
        tmp_path / "folder",
        folders.split(),
        {
            **config("MyTokenizer", auto_map={"AutoTokenizer": ["code.MyTokenizer", None]}),
            "code.py": "raise SystemExit('ran')",
        },
    )
    with pytest.raises(TokenizerError, match=r"(?s)`auto_map`.*custom code"):
        Tokenizer.from_pretrained(folder)


@pytest.mark.slow
def test_a_live_tokenizer_is_taken_as_it_is_now(tmp_path, transformers):
    theirs = transformers.AutoTokenizer.from_pretrained(write_folder(tmp_path / "m"))
    theirs.split_special_tokens = True
    assert_same(Tokenizer.from_pretrained(theirs), theirs)
    theirs.split_special_tokens = False
    theirs.add_tokens(["<new>"])
    theirs.pad_token = "<|turn|>"
    assert_same(Tokenizer.from_pretrained(theirs), theirs)


@pytest.mark.slow
def test_a_token_that_was_special_once_is_refused_where_special_tokens_are_split(
    tmp_path, transformers
):
    keys = {"split_special_tokens": True, "added_tokens_decoder": DECODER}
    folder = folders.write(tmp_path / "folder", folders.split(), config(**keys))
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for source in (folder, theirs):
        with pytest.raises(TokenizerError, match=r"'<\|turn\|>' was special once"):
            Tokenizer.from_pretrained(source)


@pytest.mark.slow
def test_a_class_that_does_more_than_its_backend_is_refused(tmp_path, transformers):
    class Shouting(transformers.PreTrainedTokenizerFast):
        def _encode_plus(self, text, *args, **kwargs):
            return super()._encode_plus(text.upper(), *args, **kwargs)

        def _batch_encode_plus(self, texts, *args, **kwargs):
            return super()._batch_encode_plus([t.upper() for t in texts], *args, **kwargs)

    theirs = Shouting.from_pretrained(write_folder(tmp_path / "m"))
    with pytest.raises(TokenizerError, match="Shouting does more than its Rust backend"):
        Tokenizer.from_pretrained(theirs)


@pytest.mark.parametrize("special_text", ["special", "text"])
def test_split_special_tokens_still_end_rows_with_eos(tmp_path, special_text):
    folder = write_folder(tmp_path / "m", config={"split_special_tokens": True})
    ours = Tokenizer.from_pretrained(folder)
    rows = [{"prompt": "a<|end|>", "chosen": "b<|end|>", "rejected": "c"}]
    got = PairDataset.from_rows(rows, ours, special_tokens_in_text=special_text)
    assert got.chosen_ids.tolist() == [[*b"b<|end|>", ours.eos_id]]
    assert got.prompt_ids.tolist() == [list(b"a<|end|>")]
    assert got.rejected_ids.tolist() == [[*b"c", ours.eos_id]]


def test_trl_spells_eos_where_special_tokens_are_split(tmp_path):
    folder = write_folder(tmp_path / "m", config={"split_special_tokens": True})
    ours = Tokenizer.from_pretrained(folder)
    rows = [{"prompt": "a", "chosen": "b<|end|>", "rejected": "c"}]
    got = PairDataset.from_rows(rows, ours, boundary="trl")
    assert got.chosen_ids.tolist() == [list(b"b<|end|>")]
    assert got.rejected_ids.tolist() == [list(b"c<|end|>")]


@pytest.mark.parametrize(
    "name", [CONFIG, "config.json", "special_tokens_map.json", "added_tokens.json"]
)
def test_a_damaged_file_is_named(tmp_path, name):
    folder = folders.write(tmp_path / "folder", folders.split(), {name: "{"})
    with pytest.raises(TokenizerError, match=name):
        Tokenizer.from_pretrained(folder)


JUNK = [7, 1e400, True, "", "x", "\ud800", [], [7], [["x"]], [None], {}, {"x": 7}, {"x": {}}, {"7": None},
        {"content": 7}, {"__type": "AddedToken"}, {"__type": "AddedToken", "content": "\ud800"},
        {"7": {"content": "x", "id": 7, "more": 7}}]  # fmt: skip
JUNK_KEYS = [
    *(
        (CONFIG, key)
        for key in ("eos_token", "image_token", "extra_special_tokens", "tokenizer_class")
    ),
    *((CONFIG, key) for key in ("additional_special_tokens", "model_specific_special_tokens")),
    *((CONFIG, key) for key in ("added_tokens_decoder", "split_special_tokens", "unk_token")),
    *(
        (CONFIG, key)
        for key in ("add_prefix_space", "legacy", "chat_template", "auto_map", "other")
    ),
    *(("special_tokens_map.json", key) for key in ("eos_token", "extra_special_tokens", "x_token")),
    *(("special_tokens_map.json", key) for key in ("additional_special_tokens", "other")),
    *(("added_tokens.json", key) for key in ("<new>", "")),
    *(("config.json", key) for key in ("model_type", "tokenizer_class", "model_name")),
    *(("tokenizer.json", key) for key in ("added_tokens", "padding", "post_processor", "model")),
]


@pytest.mark.parametrize("made", ["split", "gpt2", "gemma"])
@pytest.mark.parametrize(("file", "key"), JUNK_KEYS)
def test_junk_is_a_tokenizer_error_or_changes_nothing_that_panics(tmp_path, file, key, made, alone):
    kind = {"split": None, "gpt2": "GPT2Tokenizer", "gemma": "GemmaTokenizer"}[made]
    for number, junk in enumerate(JUNK):
        files = {CONFIG: {"tokenizer_class": kind}, "config.json": {}}
        if file == "tokenizer.json":
            files[file] = getattr(folders, made)() | {key: junk}
        else:
            files[file] = files.get(file, {}) | {key: junk}
        folder = folders.write(tmp_path / str(number), getattr(folders, made)(), files)
        try:
            ours = Tokenizer.from_pretrained(folder)
        except TokenizerError:
            continue
        assert ours.encode("the").size


@pytest.mark.parametrize("more", [{}, {"tokenizer_class": "GPT2Tokenizer"}])
def test_rows_of_a_gpt2_folder_that_names_no_token_end_with_eos(tmp_path, more):
    files = {
        CONFIG: {"model_max_length": 1024, **more},
        "config.json": {"model_type": "gpt2"},
    }
    tok = Tokenizer.from_pretrained(folders.write(tmp_path / "m", folders.gpt2(), files))
    (eos,) = tok.encode("<|endoftext|>")
    assert (tok.bos_id, tok.eos_id, tok.pad_id) == (eos, eos, None)
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    pairs = PairDataset.from_rows([row], tok)
    assert [ids[-1] for ids in (*pairs.chosen_ids, *pairs.rejected_ids)] == [eos, eos]
