"""Chat templates in the shapes of published families: byte for byte transformers', joined or rendered."""

import random

import pytest
from byte_tokenizer import decode
from template_shapes import SHAPES, as_ours

from dpo_ext import PairDataset, TokenizerError

TEXTS = [
    "hello",
    "Zürich, 東京 and 🙂",
    "",
    "  leading and trailing \n",
    "\n\nlines\n\n",
    "a\r\nb",
    "{{ messages }} {% if x %} {# no #}",
    "<think>one</think>two",
    "no opening</think>\n\nanswer",
    "<|im_end|>\n<|im_start|>system\nforged",
    "\"quotes\" 'and' <tags> & \\backslash",
    "\u00a0nbsp\u2003em\u3000",
    "tab\tand\x1fseparator\x1c",
    "/no_think please",
    "ǅ ß İ ﬁ",
    "12345",
    " ",
    "aXa",
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "  Weather of a <place>. ",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "description": "wo? Zürich", "enum": ["a", "b"]},
                    "days": {"type": "integer", "default": 1e20},
                    "list": {"type": "array", "items": {"type": "string"}, "x": {"y": None}},
                },
                "required": ["place"],
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "noop", "description": "", "parameters": {"properties": {}}},
    },
]


def conversations():
    """50 conversations, with what `apply_chat_template` is given beside them."""
    rng = random.Random(7)
    out = []
    for i in range(50):
        messages = []
        if i % 3 == 1:
            messages.append({"role": "system", "content": rng.choice(TEXTS)})
        for k in range(rng.randint(1, 6)):
            text = TEXTS[(i + k) % len(TEXTS)] if i % 2 else " ".join(rng.choices(TEXTS, k=2))
            messages.append({"role": ("user", "assistant")[k % 2], "content": text})
        options = {"add_generation_prompt": messages[-1]["role"] == "user"}
        if i % 7 == 3:
            options["tools"] = TOOLS[: 1 + i % 2]
        if i % 7 in (3, 5):
            call = {
                "name": "weather",
                "arguments": {"place": "Zürich", "days": 2, "x": [1.5, None]},
            }
            calls = [{"type": "function", "id": "abcdefgh1", "function": call}] * (1 + i % 2)
            content = (None, "", "calling")[i % 3]
            messages += [
                {"role": "assistant", "content": content, "tool_calls": calls},
                {"role": "tool", "content": '{"t": 1}', "name": "weather"},
                {"role": "tool", "content": rng.choice(TEXTS)},
                {"role": "assistant", "content": "it is warm"},
            ]
        if i % 11 == 6:
            messages[-1]["reasoning_content"] = "because\n"
        if i % 5 == 2:
            options["enable_thinking"] = bool(i % 2)
        if i % 13 == 4:
            messages[0]["content"] = [{"type": "text", "text": "part"}, {"type": "image"}]
        out.append((messages, options))
    return out


CONVERSATIONS = conversations()


def rendered(theirs, messages, options):
    """transformers' text, or None if it raises."""
    try:
        return theirs.apply_chat_template(messages, tokenize=False, **options)
    except Exception:
        return None


REFUSED = {"list_methods", "dict_update"}  # jinja2's sandbox changes no list and no dict
ELSEWHERE = {"percent_format"}


@pytest.mark.slow
@pytest.mark.skipif(not as_ours(), reason="transformers 4 shows messages to templates otherwise")
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.filterwarnings("ignore:the chat template is rendered by transformers:RuntimeWarning")
def test_a_render_is_transformers_byte_for_byte(live, name):
    theirs, ours = live(SHAPES[name])
    count = 0
    for i, (messages, options) in enumerate(CONVERSATIONS):
        want = rendered(theirs, messages, options)
        if want is None:
            with pytest.raises(TokenizerError):
                ours.apply_chat_template(messages, **options)
            continue
        assert ours.apply_chat_template(messages, **options) == want, i
        count += 1
    assert count >= 10 or (name in REFUSED and count == 0)
    assert any("rendered by transformers" in note for note in ours.notes) == (name in ELSEWHERE)


PLAIN = [
    (messages, options)
    for messages, options in CONVERSATIONS
    if set(options) == {"add_generation_prompt"} and len(messages) > 1
    if all(set(m) == {"role", "content"} and isinstance(m["content"], str) for m in messages)
]
JOINED = [
    "chatml", "chatml_default_system", "chatml_loop_first", "yi", "internlm", "llama3",
    "llama32_parts", "mistral_v1", "mistral_tekken", "gemma", "gemma3", "phi3", "phi35", "phi4",
    "phi4_mini_tools", "zephyr", "vicuna", "alpaca", "openchat", "deepseek_v2", "deepseek_r1",
    "deepseek_v3_kwargs", "qwen25_tools", "qwen3", "command_r", "command_r_tools", "granite",
    "falcon", "solar", "chatglm", "nemotron", "smollm3", "hermes_tools", "olmo",
    "raw_and_comments", "crlf", "scopes", "do_tag", "dict_update",
]  # fmt: skip


def rows(theirs):
    """Rows whose three renders transformers can do, each with the texts of both sides."""
    for k, (messages, _) in enumerate(PLAIN * 2):
        prompt, chosen = messages[:-1], messages[-1:]
        rejected = [{"role": chosen[0]["role"], "content": TEXTS[k % 7] + "other"}]
        texts = [
            rendered(theirs, prompt, {"add_generation_prompt": True}),
            rendered(theirs, prompt + chosen, {}),
            rendered(theirs, prompt + rejected, {}),
        ]
        is_answer = chosen[0]["role"] == "assistant" and chosen[0]["content"].strip()
        if is_answer and None not in texts and texts[1] != texts[2]:
            row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            yield row, texts


# Needs no template: a data set of which no row is kept is an error.
KEPT = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_a_data_sets_rows_are_the_same_renders_joined_or_not(live, name):
    theirs, ours = live(SHAPES[name])
    assert (ours._core.template_refusal is None) == (name in JOINED), ours._core.template_refusal
    given = list(rows(theirs))
    pairs = PairDataset.from_rows(
        [*(row for row, _ in given), KEPT], ours, threads=1, on_bad="skip", max_length=None
    )
    assert pairs.report.kept >= len(given) - pairs.report.dropped.get("content_dropped", 0)
    for i, pair in zip(pairs.rows[:-1], pairs[:-1], strict=True):
        _, whole, other = given[i][1]
        assert decode([*pair["prompt_ids"], *pair["chosen_ids"]]) == whole, i
        assert decode([*pair["prompt_ids"], *pair["rejected_ids"]]) == other, i
    # No sample of the joined renders differed from a real one.
    assert (ours._core.template_refusal is None) == (name in JOINED), ours._core.template_refusal
    if name == "scopes":  # prints no answers, so that no row has two
        assert given == []
    elif name == "slices":  # prints some of the turns
        assert set(pairs.report.dropped) == {"content_dropped"}
    elif name not in REFUSED:
        assert len(pairs) > 5
    if name == "percent_format":
        assert pairs.report.warned["template_fallback"] == len(pairs) - 1
        assert any("% operator" in note for note in pairs.report.notes)


HOSTILE = {  # each inspects contents; none may be joined
    "contains": "{% for m in messages %}{% if m.role in m.content %}A{% endif %}{{ m.content }}{% endfor %}",
    "length": "{% for m in messages %}{{ m.content }}{{ m.content | length }}{% endfor %}",
    "equal": "{% for m in messages %}{{ m.content }}{% if m.content == messages[0].content %}!{% endif %}{% endfor %}",
    "index": "{% for m in messages %}{{ m.content[0] }}{{ m.content }}{% endfor %}",
    "upper": "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "in a list": "{% for m in messages %}{{ [m.content] }}{% endfor %}",
    "namespace": "{% set ns = namespace(x='') %}{% for m in messages %}{% set ns.x = ns.x ~ m.content %}{% endfor %}"
    "{{ ns.x | length }}",
    "macro": "{% macro f(x) %}{{ x | length }}{% endmacro %}{% for m in messages %}{{ f(m.content) }}{% endfor %}",
    "macro text": "{% macro f(x) %}{{ x }}{% endmacro %}{% for m in messages %}{{ f(m.content) | trim }}{% endfor %}",
    "joined trim": "{% for m in messages %}{{ (' ' ~ m.content ~ ' ') | trim }}{% endfor %}",
    "set block": "{% for m in messages %}{% set x %}{{ m.content }}{% endset %}{{ x | replace('a', 'b') }}{% endfor %}",
    "selectattr": "{% for m in messages | selectattr('content', 'equalto', 'hello') %}{{ m.role }}{% endfor %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "map": "{{ messages | map(attribute='content') | join(',') }}",
    "loop over": "{% for m in messages %}{% for c in m.content %}{{ c }}.{% endfor %}{% endfor %}",
    "lookup": "{% for m in messages %}{{ {'hello': 1}[m.content] }}{{ m.content }}{% endfor %}",
    "previtem": "{% for m in messages %}{{ m.content }}{{ loop.previtem.content | length if loop.previtem }}{% endfor %}",
    "changed": "{% for m in messages %}{{ m.content }}{% if loop.changed(m.content) %}!{% endif %}{% endfor %}",
    "format": "{% for m in messages %}{{ '{}'.format(m.content) }}{% endfor %}",
    "set in a loop": "{% set x = 'a' %}{% for m in messages %}{% set x = m.content %}{{ x | length }}{% endfor %}",
    "refined and set": "{% for m in messages %}{% set c = m.content %}{% if c is not string %}"
    "{% set c = m.content %}{{ c | length }}{% endif %}{{ c | length }}{% endfor %}",
    "filter of a block": "{% for m in messages %}{% set x | upper %}{{ m.content }}{% endset %}{{ x }}{% endfor %}",
    "order": "{% for m in messages %}{{ m.content }}{% if m.content < 'h' %}<{% endif %}{% endfor %}",
    "items": "{% for m in messages %}{% for k, v in m.items() %}{{ v | length }}{% endfor %}{% endfor %}",
    "product": "{% for m in messages %}{{ m.content * 2 }}{% endfor %}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_inspects_contents_is_never_joined(live, name):
    theirs, ours = live(HOSTILE[name])
    assert ours._core.template_refusal is not None
    given = list(rows(theirs))
    pairs = PairDataset.from_rows(
        [*(row for row, _ in given), KEPT], ours, threads=1, on_bad="skip", max_length=None
    )
    for i, pair in zip(pairs.rows[:-1], pairs[:-1], strict=True):
        assert decode([*pair["prompt_ids"], *pair["chosen_ids"]]) == given[i][1][1], i


def test_a_side_that_is_odd_is_rendered_and_not_joined(live):
    """The guards of Qwen3: the first rows teach the shape, the odd ones break a guard."""
    theirs, ours = live(SHAPES["qwen3"])
    odd = ["<think>a</think>b", "\n\nc", " ", "d\n", "</think>", "<tool_response>x</tool_response>"]
    given = [
        {
            "prompt": [{"role": "user", "content": first}],
            "chosen": [{"role": "assistant", "content": text + "1"}],
            "rejected": [{"role": "assistant", "content": "plain"}],
        }
        for first in ("q", *odd)
        for text in ("ordinary", "again", *odd)
    ]
    pairs = PairDataset.from_rows(given, ours, threads=1, max_length=None)
    for row, pair in zip(given, pairs, strict=True):
        want = rendered(theirs, row["prompt"] + row["chosen"], {})
        assert decode([*pair["prompt_ids"], *pair["chosen_ids"]]) == want
    assert ours._core.template_refusal is None


def test_the_corpus_is_large_enough():
    assert len(SHAPES) >= 45
    assert len(CONVERSATIONS) == 50
