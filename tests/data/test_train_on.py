"""Which turns of a completion are scored: transformers' own masks of tagged templates are the oracle."""

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from byte_tokenizer import decode, write_folder
from hypothesis import given
from hypothesis import strategies as st

from dpo_ext import DataError, LimitExceeded, Limits, PairDataset, Tokenizer

TEXT = st.text(st.sampled_from("ab <think>/\n é🙂."), min_size=1, max_size=12).filter(
    lambda text: text.strip() and "think>" not in text
)


def say(role, content, **more):
    return {"role": role, "content": content, **more}


CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "look", "arguments": {"x": 1}}}
PROMPT = [say("user", "What is it?")]
SEVERAL = [
    say("assistant", "First <one>."),
    say("user", "And then?"),
    say("assistant", "Second."),
    say("user", "So?"),
    say("assistant", "Third."),
]
TOOLS = [
    say("assistant", "", tool_calls=[CALL]),
    say("tool", "42", tool_call_id="abcdefghi", name="look"),
    say("assistant", "It is 42."),
]
# Each with the tags that say what is the assistant's; without them it prints the same.
TAGGED = {
    "chatml": "{% for m in messages %}<|turn|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}",
    "trimmed": "{% for m in messages %}{{ '[' + m.role + ']' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content | trim + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "no header": "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ ' ' + m.content + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}",
    "EOS at the end alone": "{% for m in messages %}{{ '[' + m.role + ']' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '~\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '~\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% else %}"
    "{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}",
    "EOS between turns alone": "{% for m in messages %}{{ '[' + m.role + ']' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% if not loop.last %}{{ eos_token }}{% endif %}{% endgeneration %}"
    "{% else %}{{ m.content + '~\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "thoughts in the last answer": "{% for m in messages %}{{ '[' + m.role + ']' }}"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
}


def untagged(template):
    return re.sub(r"\{%-? *(end)?generation *-?%\}", "", template)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    made = {}

    def make(template):
        if template not in made:
            folder = tmp_path_factory.mktemp("tokenizer") / "model"
            write_folder(folder, template=template, config={"bos_token": "<|bos|>"})
            made[template] = (folder, Tokenizer.from_pretrained(folder))
        return made[template]

    return make


def weights_of(pairs, side):
    lists = getattr(pairs, f"{side}_weights")
    return [1.0] * len(getattr(pairs, f"{side}_ids")[0]) if lists is None else lists[0].tolist()


def scored(pairs, side="chosen"):
    """The text of a completion with brackets around what is scored."""
    ids = getattr(pairs, f"{side}_ids")[0].tolist()
    weights = weights_of(pairs, side)
    out, run = "", []
    for i, (one, weight) in enumerate(zip(ids, weights, strict=True)):
        run.append(one)
        if i + 1 == len(ids) or weights[i + 1] != weight:
            out += f"⟦{decode(run)}⟧" if weight else decode(run)
            run = []
    return out


@functools.cache
def of_transformers(folder):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


def oracle(folder, prompt, chosen):
    """Ids of a conversation, and transformers' mask of what is the assistant's."""
    made = of_transformers(folder).apply_chat_template(
        prompt + chosen, return_dict=True, return_assistant_tokens_mask=True
    )
    return made["input_ids"], made["assistant_masks"]


def check(load, template, oracle_template, chosen, prompt=PROMPT):
    folder, _ = load(oracle_template)
    ids, mask = oracle(folder, prompt, chosen)
    row = {"prompt": prompt, "chosen": chosen, "rejected": [say("assistant", "no way")]}
    pairs = PairDataset.from_rows([row], load(template)[1], train_on="assistant", max_length=None)
    begin = len(pairs.prompt_ids[0])
    assert [*pairs.prompt_ids[0], *pairs.chosen_ids[0]] == ids
    assert weights_of(pairs, "chosen") == mask[begin:]


@pytest.mark.parametrize("name", TAGGED)
@pytest.mark.parametrize("has_tags", [True, False])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_the_assistants_turns_are_those_of_transformers(load, name, has_tags, count):
    tagged = TAGGED[name]
    template = tagged if has_tags else untagged(tagged)
    assert ("generation %}" in template) == has_tags
    check(load, template, tagged, SEVERAL[:count])


@pytest.mark.parametrize("name", TAGGED)
@given(texts=st.lists(TEXT, min_size=3, max_size=3))
def test_whatever_the_turns_say(load, name, texts):
    roles = ("assistant", "user", "assistant")
    chosen = [say(role, text) for role, text in zip(roles, texts, strict=True)]
    check(load, untagged(TAGGED[name]), TAGGED[name], chosen)


# Their tags enclose what the template itself writes before an answer (a header, the start of thoughts), or leave the
# space behind it out.
APART = {
    "deepseek_r1_distill",
    "deepseekv3",
    "gptoss",
    "llava_next",
    "muse_glimmer",
    "qwen2_5",
    "qwen3_5_nothink",
    "qwen3_5_think",
    "qwen3_6",
    "qwen3_8",
}


def templates_of_trl():
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.jinja"))}


@pytest.mark.slow
def test_trls_templates_and_its_tagged_ones_agree(load):
    templates = templates_of_trl()
    agree, differ, refused = set(), set(), set()
    for name, template in templates.items():
        tagged = templates.get(f"{name}_training")
        if tagged is None:
            continue
        for chosen in (SEVERAL, TOOLS):
            row = {"prompt": PROMPT, "chosen": chosen, "rejected": [say("assistant", "no way")]}
            options = {"train_on": "assistant", "max_length": None}
            try:
                other = PairDataset.from_rows([row], load(tagged)[1], **options)
                own = PairDataset.from_rows([row], load(template)[1], **options)
            except DataError as error:
                if error.reason == "unknown_turns":
                    refused.add(name)
                continue
            if decode(own.chosen_ids[0].tolist()) == decode(other.chosen_ids[0].tolist()):
                (agree if scored(own) == scored(other) else differ).add(name)
    assert {"llama3", "gemma", "gemma3", "cohere", "phi3", "lfm2", "qwen3_instruct_2507"} <= agree
    assert differ <= APART
    assert refused <= {"diffusion_gemma", "gptoss"}


@pytest.mark.slow
def test_tags_of_trl_are_read_as_transformers_reads_them(load):
    seen = 0
    for name, template in templates_of_trl().items():
        if not name.endswith("_training") or name.startswith(("idefics", "smolvlm", "llava")):
            continue
        for chosen in (SEVERAL, TOOLS):
            row = {"prompt": PROMPT, "chosen": chosen, "rejected": [say("assistant", "no way")]}
            try:
                PairDataset.from_rows([row], load(template)[1], max_length=None)
            except DataError:
                continue  # of these messages the template makes nothing
            check(load, template, template, chosen)
            seen += 1
    assert seen > 30


CHATML = untagged(TAGGED["chatml"])


def one(tok, chosen, rejected=None, **options):
    row = {
        "prompt": PROMPT,
        "chosen": chosen,
        "rejected": rejected or [say("assistant", "no way")],
    }
    return PairDataset.from_rows([row], tok, **{"max_length": None, **options})


@pytest.mark.parametrize("template", [CHATML, TAGGED["chatml"]])
def test_the_last_turn_alone(load, template):
    pairs = one(load(template)[1], SEVERAL, train_on="last")
    before, last = "First <one>.<|end|>\n<|turn|>user\nAnd then?", "⟦Third.<|end|>\n⟧"
    assert scored(pairs).startswith(before)
    assert scored(pairs).endswith("So?<|end|>\n<|turn|>assistant\n" + last)
    assert scored(pairs).count("⟦") == 1
    assert scored(pairs, "rejected") == "⟦no way<|end|>\n⟧"


@pytest.mark.parametrize("template", [CHATML, TAGGED["chatml"]])
def test_a_completion_that_ends_with_a_question(load, template):
    pairs = one(load(template)[1], SEVERAL[:4], train_on="last")
    assert scored(pairs).endswith("assistant\n⟦Second.<|end|>\n⟧<|turn|>user\nSo?<|end|>\n")


@pytest.mark.parametrize("train_on", ["last", "assistant"])
def test_a_completion_of_one_turn_is_scored_as_always(load, train_on):
    tok = load(CHATML)[1]
    pairs = one(tok, SEVERAL[:1], train_on=train_on)
    assert pairs.chosen_weights is None
    assert pairs.rejected_weights is None
    assert pairs.chosen_ids == one(tok, SEVERAL[:1]).chosen_ids


HIDING = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if loop.last %}$END{% else %}$GO{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize(
    "template",
    [
        HIDING,
        "{% for m in messages %}[{{ m.role }}]{{ m.content | tojson }}"
        "{% if loop.last %}!{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
        # The header is not what generation begins with.
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    ],
)
def test_turns_that_cannot_be_told_apart_are_a_bad_row(load, template):
    tok = load(template)[1]
    with pytest.raises(DataError, match=r"`chosen`.*can be told apart.*\nhint:") as caught:
        one(tok, SEVERAL, train_on="assistant")
    assert caught.value.reason == "unknown_turns"
    rows = [
        {"prompt": PROMPT, "chosen": chosen, "rejected": [say("assistant", "no")]}
        for chosen in (SEVERAL, SEVERAL[:1])
    ]
    pairs = PairDataset.from_rows(rows, tok, train_on="assistant", on_bad="skip")
    assert pairs.report.dropped == {"unknown_turns": 1}


def test_a_text_is_one_turn_and_a_transcript_is_refused(load):
    tok = load(CHATML)[1]
    row = {"prompt": "Why?", "chosen": " Because.", "rejected": " No."}
    assert PairDataset.from_rows([row], tok, train_on="last").chosen_weights is None
    asks = {**row, "chosen": " Because.\n\nHuman: so?\n\nAssistant: yes"}
    with pytest.raises(DataError, match="a text with a question in it"):
        PairDataset.from_rows([asks], tok, train_on="last")
    PairDataset.from_rows([asks], tok)


def test_ids_have_no_turns_but_weights(load):
    tok = load(CHATML)[1]
    row = {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]}
    with pytest.raises(DataError, match=r"`chosen_weights`.*found ids"):
        PairDataset.from_rows([row], tok, train_on="last")
    weights = {"chosen_weights": [0, 1], "rejected_weights": [1]}
    pairs = PairDataset.from_rows([row | weights], tok, train_on="last")
    assert pairs.chosen_weights.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("boundary", ["joint", "separate", "trl"])
@pytest.mark.parametrize("special", ["special", "text"])
def test_every_boundary_weighs_the_same_tokens(load, boundary, special):
    if (boundary, special) == ("trl", "text"):
        pytest.skip("TRL has no such rule")
    chosen = [*SEVERAL[:2], say("assistant", "forged <|end|> here")]
    pairs = one(
        load(CHATML)[1],
        chosen,
        train_on="assistant",
        boundary=boundary,
        special_tokens_in_text=special,
    )
    assert scored(pairs) == (
        "⟦First <one>.<|end|>\n⟧<|turn|>user\nAnd then?<|end|>\n<|turn|>assistant\n"
        "⟦forged <|end|> here<|end|>\n⟧"
    )


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end", "keep_completions"])
@pytest.mark.parametrize("max_length", [35, 45, 60])
def test_truncation_keeps_weights_beside_their_tokens(load, truncation, max_length):
    tok = load(CHATML)[1]
    options = {"train_on": "assistant", "truncation": truncation}
    rejected = [say("assistant", "no way"), *SEVERAL[1:3]]
    whole = one(tok, SEVERAL, rejected, **options)
    cut = one(tok, SEVERAL, rejected, max_length=max_length, **options)
    for side in ("chosen", "rejected"):
        ids = [getattr(pairs, f"{side}_ids")[0] for pairs in (whole, cut)]
        weights = [weights_of(pairs, side) for pairs in (whole, cut)]
        n = len(ids[1])
        kept = slice(len(ids[0]) - n, None) if truncation == "keep_end" else slice(n)
        assert ids[0][kept].tolist() == ids[1].tolist()
        assert weights[0][kept] == weights[1]


def test_a_side_whose_last_turn_is_cut_off_has_nothing_to_score(load):
    with pytest.raises(DataError, match="turns that `train_on` names, found none left") as caught:
        one(load(CHATML)[1], SEVERAL, train_on="last", max_length=40)
    assert caught.value.reason == "no_completion_tokens"


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_it_reaches_the_table_of_every_layout(load, layout):
    pairs = one(load(CHATML)[1], SEVERAL, train_on="assistant")
    (batch,) = pairs.plan(layout=layout, pairs_per_batch=1)
    want = np.concatenate([pairs.chosen_weights[0], pairs.rejected_weights[0]])
    assert batch.table.weights.tolist() == want.tolist()
    assert 0.0 in want.tolist()


def test_an_unknown_name_is_refused(load):
    with pytest.raises(ValueError, match="unknown `train_on` 'first': there is 'completion'"):
        one(load(CHATML)[1], SEVERAL, train_on="first")


def test_another_rule_is_another_entry_of_the_cache(load, tmp_path):
    pytest.importorskip("pyarrow")
    tok = load(CHATML)[1]
    path = tmp_path / "pairs.jsonl"
    row = {"prompt": PROMPT, "chosen": SEVERAL, "rejected": SEVERAL[:1]}
    path.write_text(json.dumps(row) + "\n")
    found = [
        PairDataset.from_files(path, tok, train_on=rule, cache_dir=tmp_path / "c", max_length=None)
        for rule in ("completion", "last", "assistant", "last")
    ]
    assert [sum(pairs.chosen_weights.values) if pairs.weights else None for pairs in found] == [
        None,
        *(
            sum(one(tok, SEVERAL, train_on=rule).chosen_weights.values)
            for rule in ("last", "assistant", "last")
        ),
    ]
    assert len([entry for entry in (tmp_path / "c").iterdir() if len(entry.name) == 32]) == 3
    assert len({pairs.plan(layout="padded", pairs_per_batch=1).digest for pairs in found}) == 3


def test_the_command_line_takes_it(load, tmp_path):
    pytest.importorskip("pyarrow")
    pytest.importorskip("typer")
    from dpo_ext import cli

    folder, tok = load(CHATML)
    path, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    row = {"prompt": PROMPT, "chosen": SEVERAL, "rejected": [say("assistant", "no way")]}
    path.write_text(json.dumps(row) + "\n")
    command = ["prepare", str(path), "--tokenizer", str(folder), "--out", str(out)]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, "--train-on", "last", "--max-length", "0"])
    assert stopped.value.code == 0
    wanted = one(tok, SEVERAL, train_on="last")
    assert PairDataset.load(out).chosen_weights == wanted.chosen_weights


def test_a_conversation_that_costs_too_many_renders_is_over_a_limit(load):
    tok = load(CHATML)[1]
    chosen = [say(("assistant", "user")[i % 2], f"turn {i} " + "x" * 200) for i in range(201)]
    limits = Limits(max_rendered_bytes=50_000)
    pairs = one(tok, chosen, train_on="last", limits=limits)
    assert scored(pairs).count("⟦") == 1
    with pytest.raises(LimitExceeded, match=r"101 turns of 4\d+ bytes") as caught:
        one(tok, chosen, train_on="assistant", limits=limits)
    assert caught.value.field == "max_rendered_bytes"
    assert one(tok, chosen, train_on="assistant").weights


PROMPT_PRINTED_LATER = (
    "{%- set asked = messages | selectattr('role', 'equalto', 'user') | list %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% if tools and m == asked[-1] %}[T]{{ tools | tojson }}[/T]{% endif %}"
    "[INST] {{ m.content }}[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def test_a_prompt_that_is_printed_otherwise_with_more_behind_it_is_not_trained_on(load):
    """Mistral's tools stand before the last question, so that the common start of both ends before the prompt does."""
    tok = load(PROMPT_PRINTED_LATER)[1]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    row = {
        "prompt": [say("user", "SECRET?")],
        "chosen": [say("assistant", "Sunny."), say("user", "And then?"), say("assistant", "Rain.")],
        "rejected": [say("assistant", "Sunny."), say("user", "And then?"), say("assistant", "No.")],
        "tools": tools,
    }
    with pytest.raises(DataError) as caught:
        PairDataset.from_rows([row], tok, train_on="assistant")
    assert caught.value.reason == "unknown_turns"
    del row["tools"]
    pairs = PairDataset.from_rows([row], tok, train_on="assistant")
    ids, weights = pairs.chosen_ids[0], pairs.chosen_weights[0]
    scored = tok.decode(ids[weights == 1])
    assert "SECRET" not in scored
    assert "Sunny." in scored
