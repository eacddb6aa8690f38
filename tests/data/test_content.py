"""Nothing that a row says goes missing in silence: its texts are looked for in its own render."""

import json
from datetime import datetime

import pyarrow as pa
import pytest
from byte_tokenizer import BOS, decode, tokenizer

from dpo_ext import DataError, PairDataset


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def row(prompt=None, chosen="yes indeed", rejected="not at all", **more):
    return {
        "prompt": prompt or [say("user", "is it?")],
        "chosen": [say("assistant", chosen)],
        "rejected": [say("assistant", rejected)],
        **more,
    }


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CONCATENATING = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CALLS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<{{ c.function.name }} {{ c.function.arguments | tojson }}>{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def load(tmp_path):
    def make(template, **options):
        return tokenizer(
            tmp_path / f"m{len(list(tmp_path.iterdir()))}", template=template, **options
        )

    return make


def texts(pairs, i=0):
    return [
        decode(pairs[i][name].tolist()) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    ]


def refused(rows, tok, reason="content_dropped", **options):
    with pytest.raises(DataError) as caught:
        PairDataset.from_rows(rows, tok, **options)
    assert caught.value.reason == reason
    return caught.value


# ---- what templates leave out ---------------------------------------------------------------------

DROPPING = {
    "a role": (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}",
        [say("system", "be kind to them all"), say("user", "is it?")], "prompt", "message 1 (`system`)",
    ),
    "a short text that stands elsewhere, too": (
        "{% for m in messages %}{% if m.role != 'observer' %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}",
        [say("observer", "ok"), say("user", "look at it")], "prompt", "message 1 (`observer`)",
    ),
    "all but the last turn": (
        "{% for m in messages[-2:] %}[{{ m.role }}]{{ m.content }}{% endfor %}",
        [say("user", "a long first question"), say("assistant", "hm"), say("user", "is it?")], "prompt", "message 1 (`user`)",
    ),
    "the end of a text": (
        "{% for m in messages %}[{{ m.role }}]{{ m.content[:10] }}{% endfor %}",
        [say("user", "a text of more than ten letters")], "prompt", "message 1 (`user`)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DROPPING)
def test_text_that_the_template_leaves_out_makes_a_bad_row(load, name):
    template, prompt, field, said = DROPPING[name]
    error = refused([row(prompt)], load(template))
    assert error.field == field
    assert said in str(error)


def test_what_is_dropped_in_an_answer_names_its_side(load):
    tok = load(
        "{% for m in messages %}{% if m.role != 'narrator' %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
    )
    bad = row()
    bad["rejected"] = [say("assistant", "no"), say("narrator", "he said, and left the room")]
    error = refused([bad], tok)
    assert (error.field, "message 2 (`narrator`)" in str(error)) == ("rejected", True)
    implicit = {
        "chosen": [*bad["prompt"], *bad["chosen"]],
        "rejected": [*bad["prompt"], *bad["rejected"]],
    }
    assert "`rejected`: message 3 (`narrator`)" in str(refused([implicit], tok))


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}",
        "{% for m in messages %}[{{ m.role }}]{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}[{{ m.role }}]{{ m.content | tojson }}{% endfor %}",
        "{% for m in messages %}[{{ m.role }}]{{ m.content | replace('\n', ' | ') }}{% endfor %}",
        "{% for m in messages %}[{{ m.role }}]{{ m.content.strip() if m.role == 'user' else m.content.split('</think>')[-1].strip() }}{% endfor %}",
        PLAIN,
        CONCATENATING,
    ],
)
@pytest.mark.parametrize(
    "text",
    ["  a text of words \n", "one\nand \"two\" and \\ three", "Zürich, 東京 and 🙂🙂🙂", "<think>why</think>\n\nbecause of it", "ok", "?", "\u00a0"],
)  # fmt: skip
def test_text_that_is_printed_otherwise_is_there(load, template, text):
    pairs = PairDataset.from_rows(
        [row([say("user", text)], chosen=text + "yes it is")], load(template)
    )
    assert len(pairs) == 1


def test_a_mark_of_ours_never_reaches_the_ids(load):
    pairs = PairDataset.from_rows([row([say("user", "ok")], chosen="a", rejected="b")], load(PLAIN))
    assert texts(pairs) == ["[user]ok\n[assistant]", "a\n", "b\n"]


# ---- parts ----------------------------------------------------------------------------------------


def test_a_template_of_parts_reads_parts(load):
    tok = load(PARTS)
    pairs = PairDataset.from_rows(
        [row([say("user", parts("is ", "it?"))], parts("yes"), parts("no"))], tok
    )
    assert texts(pairs) == ["[user]is it?\n[assistant]", "yes\n", "no\n"]
    assert texts(PairDataset.from_rows([row([say("user", "is it?")], "yes", "no")], tok)) == texts(
        pairs
    )


def test_what_a_template_reads_does_not_depend_on_the_first_row(load):
    fussy = "{% if not style is defined %}{{ raise_exception('style?') }}{% endif %}" + PARTS
    good = row(chosen="yes", rejected="no", chat_template_kwargs={"style": "x"})
    rows = [row(chosen="yes", rejected="no"), good, good]
    for order in (rows, rows[::-1]):
        assert len(PairDataset.from_rows(order, load(fussy), on_bad="skip", threads=1)) == 2


def test_a_string_where_a_template_reads_parts_of_some_roles_is_refused(load):
    tok = load(
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'user' %}{{ m.content }}"
        "{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    error = refused([row(chosen="a string that it does not print")], tok)
    assert error.field == "chosen"
    assert "does not print its `content`" in str(error)


@pytest.mark.parametrize("template", [PLAIN, CONCATENATING])
def test_parts_are_joined_where_a_template_reads_strings(load, template):
    tok = load(template)
    want = PairDataset.from_rows([row([say("user", "is it?")], "yes", "no")], tok)
    given = row([say("user", parts("is ", "it?"))], parts("yes"), ["no"])
    assert texts(PairDataset.from_rows([given], tok)) == texts(want)


def test_a_list_is_never_trained_on_as_python_prints_it(load):
    odd = [{"type": "tool_result", "id": 7}, {"type": "text", "text": "forty-two of them"}]
    error = refused([row([say("user", "is it?"), say("tool", odd)])], load(PLAIN))
    assert "as Python prints" in str(error)


def test_a_tools_answer_may_be_any_value(load):
    tok = load(
        "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}{{ m.content | tojson }}{% endif %}\n{% endfor %}"
    )
    for answer, shown in (
        ({"celsius": 20.5}, '{"celsius": 20.5}'),
        (20.5, "20.5"),
        (True, "true"),
        (parts("warm"), '[{"type": "text", "text": "warm"}]'),
    ):
        pairs = PairDataset.from_rows([row([say("user", "is it?"), say("tool", answer)])], tok)
        assert shown in texts(pairs)[0]
    for answer in ({"celsius": 20.5, "sky": "clear"}, 20.5, True, "clear"):
        refused(
            [row([say("user", "is it?"), say("tool", answer), say("user", "so?")])],
            load(PLAIN.replace("m.content", "'' if m.role == 'tool' else m.content")),
        )
    error = refused([row([say("user", {"a": 1})])], tok, "bad_messages")
    assert "found an object" in str(error)


# ---- pictures -------------------------------------------------------------------------------------

PICTURES = {
    "a part": row([say("user", [{"type": "image"}, *parts("what is it?")])]),
    "a url": row([say("user", [{"type": "image_url", "image_url": {"url": "x"}}, *parts("what is it?")])]),
    "a part without a type": row([say("user", [{"image": "x.png"}, *parts("what is it?")])]),
    "a column": row(images=["x.png"]),
    "one image": row(image={"bytes": None, "path": "x.png"}),
    "a column beside text": {"prompt": "<image>what is it?", "chosen": " a", "rejected": " b", "images": ["x"]},
    "a film": row(videos=["x.mp4"]),
    "a sound": row([say("user", [{"type": "input_audio", "input_audio": {}}, *parts("what is it?")])]),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_refused_or_passed_over_and_counted(load, name):
    template = (
        "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}{% endif %}\n{% endfor %}"
    )
    tok = load(template)
    error = refused([PICTURES[name]], tok, "images")
    assert 'images="ignore"' in str(error)
    for pairs in (
        PairDataset.from_rows([PICTURES[name]], tok, images="ignore"),
        PairDataset.from_arrow(pa.Table.from_pylist([PICTURES[name]]), tok, images="ignore"),
    ):
        assert pairs.report.warned["images"] == 1


def test_text_beside_a_picture_is_joined_under_a_template_of_strings(load):
    given = row([say("user", [{"type": "image"}, *parts("what is it?")])])
    pairs = PairDataset.from_rows([given], load(CONCATENATING), images="ignore")
    assert texts(pairs)[0] == "[user]what is it?\n[assistant]"
    assert pairs.report.warned == {"images": 1}


@pytest.mark.parametrize("nothing", [None, [], [None], ""])
def test_no_picture_is_none(load, nothing):
    assert PairDataset.from_rows([row(images=nothing)], load(PLAIN)).report.warned == {}


def test_bytes_of_pictures_are_not_looked_at(load):
    table = pa.Table.from_pylist([{**row(), "images": [{"bytes": b"\xff\xd8", "path": None}]}])
    with pytest.raises(DataError) as caught:
        PairDataset.from_arrow(table, load(PLAIN))
    assert (caught.value.reason, caught.value.field) == ("images", "images")


# ---- tools ----------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}


def call(arguments):
    return [{"type": "function", "function": {"name": "look_up", "arguments": arguments}}]


def test_arguments_that_are_json_already_are_counted(load):
    prompt = [say("user", "is it?"), say("assistant", "", tool_calls=call('{"at": "sky"}'))]
    pairs = PairDataset.from_rows([row(prompt)], load(CALLS))
    assert pairs.report.warned == {"arguments_as_text": 1}
    prompt[1]["tool_calls"] = call({"at": "sky"})
    assert PairDataset.from_rows([row(prompt)], load(CALLS)).report.warned == {}
    as_it_is = CALLS.replace("arguments | tojson", "arguments")
    prompt[1]["tool_calls"] = call('{"at": "sky"}')
    assert PairDataset.from_rows([row(prompt)], load(as_it_is)).report.warned == {}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]])
def test_tools_come_as_a_list_or_as_text(load, tools):
    pairs = PairDataset.from_rows([row(tools=tools)], load(CALLS))
    assert texts(pairs)[0].startswith(json.dumps([TOOL]))


def test_tools_and_calls_that_are_not_printed_are_counted_or_refused(load):
    tok = load(PLAIN)
    assert PairDataset.from_rows([row(tools=[TOOL])], tok).report.warned == {"tools_dropped": 1}
    prompt = [say("user", "is it?"), say("assistant", "let me see", tool_calls=call({"at": "sky"}))]
    pairs = PairDataset.from_rows([row(prompt)], tok)
    assert pairs.report.warned == {"tool_calls_dropped": 1}
    bad = row()
    bad["chosen"] = [say("assistant", "", tool_calls=call({"at": "sky"}))]
    error = refused([bad], tok)
    assert (error.field, "`tool_calls`" in str(error)) == ("chosen", True)


def test_thoughts_of_earlier_turns_are_dropped_on_purpose(load):
    tok = load(PLAIN)
    prompt = [
        say("user", "is it?"),
        say("assistant", "hm", reasoning_content="I wonder why"),
        say("user", "well?"),
    ]
    assert PairDataset.from_rows([row(prompt)], tok).report.warned == {}
    last = row()
    last["chosen"][0]["reasoning_content"] = "I wonder why"
    assert PairDataset.from_rows([last], tok).report.warned == {"reasoning_dropped": 1}


# ---- nulls of Arrow -------------------------------------------------------------------------------


def test_keys_that_are_null_because_of_other_rows_are_not_there(load, tmp_path):
    tok = load(CALLS)
    rows = []
    for arguments in ({"at": "sky"}, {"city": "Bern", "days": 3}):
        prompt = [say("user", "is it?"), say("assistant", "", tool_calls=call(arguments))]
        tool = {
            "type": "function",
            "function": {
                "name": "look_up",
                "parameters": {"properties": {key: {"type": "string"} for key in arguments}},
            },
        }
        rows.append(row(prompt, tools=[tool]))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    want = PairDataset.from_files(path, tok)
    table = pa.Table.from_pylist(rows)
    got = PairDataset.from_arrow(table, tok)
    assert [texts(got, i) for i in range(2)] == [texts(want, i) for i in range(2)]
    kept = PairDataset.from_arrow(table, tok, keep_nulls=True)
    assert '"city": null' in texts(kept)[0]


@pytest.mark.slow  # datasets may start a process when it is imported
def test_nulls_of_data_sets_are_not_there_whatever_the_way(load):
    datasets = pytest.importorskip("datasets")
    tok = load(CALLS)
    rows = []
    for arguments in ({"at": "sky"}, {"days": 3}):
        rows.append(row([say("user", "is it?"), say("assistant", "", tool_calls=call(arguments))]))
    want = [texts(PairDataset.from_rows(rows, tok), i) for i in range(2)]
    data = datasets.Dataset.from_list(rows)
    stream = data.to_iterable_dataset()
    for source in (
        data,
        stream,
        stream.map(lambda one: one),
        data.with_transform(lambda batch: batch),
    ):
        for read in (PairDataset.from_rows, PairDataset.from_arrow):
            pairs = read(source, tok)
            assert [texts(pairs, i) for i in range(2)] == want
            assert "null" in texts(read(source, tok, keep_nulls=True))[0]


# ---- options --------------------------------------------------------------------------------------


def test_variables_for_all_rows_give_way_to_those_of_a_row(load):
    tok = load("{{ style }}|" + PLAIN)
    options = {"chat_template_kwargs": {"style": "brief"}}
    rows = [row(), row(chat_template_kwargs={"style": "long"}), row(chat_template_kwargs=None)]
    pairs = PairDataset.from_rows(rows, tok, **options)
    assert [texts(pairs, i)[0].split("|")[0] for i in range(3)] == ["brief", "long", "brief"]


def test_a_variable_that_no_template_reads_is_an_error(load):
    tok = load("{{ style }}|" + PLAIN)
    with pytest.raises(ValueError, match="no chat template reads `stile`\nhint: it reads style"):
        PairDataset.from_rows([row()], tok, chat_template_kwargs={"stile": 1})
    with pytest.raises(ValueError, match="`tools` belongs to the template"):
        PairDataset.from_rows([row()], tok, chat_template_kwargs={"tools": 1})
    with pytest.raises(TypeError, match="`chat_template_kwargs` must be a dict"):
        PairDataset.from_rows([row()], tok, chat_template_kwargs="style")
    error = refused([row(chat_template_kwargs={"stile": 1})], tok, "bad_messages")
    assert error.field == "chat_template_kwargs"


@pytest.mark.parametrize(
    "line",
    [
        "{% set style = style | default('brief') %}",
        "{%- set style = style if style is defined else 'brief' -%}",
        "{% if style is not defined %}{% set style = 'brief' %}{% endif %}",
    ],
)
def test_a_variable_with_a_default_of_its_own_is_read(load, line):
    tok = load(line + "{{ style }}|" + PLAIN)
    rows = [row(), row(chat_template_kwargs={"style": "long"})]
    pairs = PairDataset.from_rows(rows, tok)
    assert [texts(pairs, i)[0].split("|")[0] for i in range(2)] == ["brief", "long"]


@pytest.mark.parametrize(
    "line", ["{% set style = 'brief' %}", "{% set style = row.style %}", "{# style #}", "{% macro style() %}{% endmacro %}"]
)  # fmt: skip
def test_a_variable_that_is_only_set_is_not_read(load, line):
    tok = load(
        "{% macro turn(m) %}{{ m.content }}{% endmacro %}{{ namespace(x=1).x }}" + line + PLAIN
    )
    with pytest.raises(ValueError, match="no chat template reads `style`") as caught:
        PairDataset.from_rows([row()], tok, chat_template_kwargs={"style": 1})
    assert not any(name in str(caught.value) for name in ("turn", "namespace", "range"))


def test_the_item_of_a_loop_is_no_variable_of_the_caller(load):
    tok = load(
        "{% for m in messages %}{% for c in m.calls %}{% if c.f %}{% set c = c.f %}{% endif %}{{ c }}{% endfor %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}{{ style }}"
    )
    with pytest.raises(ValueError, match="no chat template reads `c`\nhint: it reads style"):
        PairDataset.from_rows([row()], tok, chat_template_kwargs={"c": 1})


def test_tools_beside_texts_are_counted(load):
    data = {"prompt": "is it?", "chosen": " yes", "rejected": " no", "tools": [TOOL]}
    assert PairDataset.from_rows([data], load(PLAIN)).report.warned == {"tools_dropped": 1}


def test_the_time_of_templates_can_be_told(load):
    tok = load("{{ strftime_now('%d %b %Y') }}|" + PLAIN)
    pairs = PairDataset.from_rows([row()], tok, now=datetime(2026, 7, 4))
    assert texts(pairs)[0].startswith("04 Jul 2026|")
    with pytest.raises(TypeError, match="`now` must be a datetime"):
        PairDataset.from_rows([row()], tok, now="2026-07-04")


def test_an_empty_think_block_can_be_the_prompts(load):
    tok = load(
        "{% for m in messages %}[{{ m.role }}]{% if loop.last and m.role == 'assistant' %}"
        "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert texts(PairDataset.from_rows([row()], tok))[1] == "<think>\n\n</think>\n\nyes indeed\n"
    pairs = PairDataset.from_rows([row()], tok, empty_think="prompt")
    assert texts(pairs) == [
        "[user]is it?\n[assistant]<think>\n\n</think>\n\n",
        "yes indeed\n",
        "not at all\n",
    ]
    thoughtful = row()
    thoughtful["chosen"][0]["reasoning_content"] = "I wonder why"
    pairs = PairDataset.from_rows([thoughtful], tok, empty_think="prompt")
    assert texts(pairs)[0] == "[user]is it?\n[assistant]"


# ---- cuts on the left -----------------------------------------------------------------------------


@pytest.mark.parametrize("truncation", ["keep_end", "keep_completions"])
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_cuts_on_the_left_keep_bos(load, truncation, kind):
    config = {"bos_token": "<|bos|>"}
    if kind == "chat":
        tok, data = (
            load("{{ bos_token }}" + PLAIN, config=config),
            row([say("user", "a long question " * 9)]),
        )
    else:
        from byte_tokenizer import bos_processor

        tok = load(None, config=config, post_processor=bos_processor())
        data = {"prompt": "a long question " * 9, "chosen": " yes", "rejected": " no"}
    whole = PairDataset.from_rows([data], tok)[0]["prompt_ids"].tolist()
    assert whole[0] == BOS
    pairs = PairDataset.from_rows([data], tok, max_length=30, truncation=truncation)
    prompt = pairs[0]["prompt_ids"].tolist()
    assert (prompt[0], prompt[1:]) == (BOS, whole[len(whole) - len(prompt) + 1 :])
    assert len(prompt) + len(pairs[0]["chosen_ids"]) <= 30
    assert pairs.report.warned["truncated"] == 1
