"""The layouts of rows: each gives the ids of the same row in TRL's own layout, or says why not."""

import itertools
import json
import time

import pyarrow as pa
import pytest
from byte_tokenizer import TEMPLATE, decode, tokenizer

from dpo_ext import DataError, PairDataset


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("layouts") / "model", template=TEMPLATE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tokenizer without a chat template."""
    return tokenizer(tmp_path_factory.mktemp("plain") / "model", template=None)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


ASK = [user("sky?")]
BLUE, GREEN = assistant("blue"), assistant("green")
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
EARLIER = [user("hi"), assistant("hello")]


def explicit(prompt, chosen=(BLUE,), rejected=(GREEN,)):
    return {"prompt": list(prompt), "chosen": list(chosen), "rejected": list(rejected)}


# name -> (row, layout, the same row as TRL has it)
ROWS = {
    "implicit": ({"chosen": [*ASK, BLUE], "rejected": [*ASK, GREEN]}, "implicit", explicit(ASK)),
    "from and value in whole conversations": (
        {"chosen": [human("sky?"), gpt("blue")], "rejected": [human("sky?"), gpt("green")]},
        "implicit",
        explicit(ASK),
    ),
    "conversations as objects": (
        {"chosen": {"messages": [*ASK, BLUE]}, "rejected": {"messages": [*ASK, GREEN]}},
        "implicit",
        explicit(ASK),
    ),
    "ultrafeedback": (
        {
            "prompt": "sky?",
            "prompt_id": "0af3",
            "chosen": [*ASK, BLUE],
            "rejected": [*ASK, GREEN],
            "messages": [*ASK, BLUE],
            "score_chosen": 8.5,
            "score_rejected": 3.0,
        },
        "ultrafeedback",
        explicit(ASK),
    ),
    "ultrafeedback, a system turn and several rounds": (
        {
            "prompt": "hi",
            "chosen": [system("s"), *EARLIER, *ASK, BLUE],
            "rejected": [system("s"), *EARLIER, *ASK, GREEN],
        },
        "ultrafeedback",
        explicit([system("s"), *EARLIER, *ASK]),
    ),
    "messages with objects": (
        {"messages": [*EARLIER, *ASK], "chosen": BLUE, "rejected": GREEN},
        "messages",
        explicit([*EARLIER, *ASK]),
    ),
    "messages with lists of one": (
        {"messages": ASK, "chosen": [BLUE], "rejected": [GREEN]},
        "messages",
        explicit(ASK),
    ),
    "messages with texts": (
        {"messages": ASK, "chosen": "blue", "rejected": "green"},
        "messages",
        explicit(ASK),
    ),
    "messages that end in the chosen answer": (
        {"messages": [*ASK, BLUE], "chosen": BLUE, "rejected": GREEN},
        "messages",
        explicit(ASK),
    ),
    "a conversation under a name of its own": (
        {"conversation": ASK, "chosen": BLUE, "rejected": GREEN},
        "messages",
        explicit(ASK),
    ),
    "query and response": (
        {
            "system": "be brief",
            "history": [["hi", "hello"]],
            "query": "sky?",
            "response": "blue",
            "rejected_response": "green",
        },
        "swift",
        explicit([system("be brief"), *EARLIER, *ASK]),
    ),
    "query beside the sides": (
        {"query": "sky?", "chosen": "blue", "rejected": "green"},
        "question",
        explicit(ASK),
    ),
    "both answers in output": (
        {"instruction": "sky?", "input": "", "output": ["blue", "green"]},
        "alpaca",
        explicit(ASK),
    ),
    "speakers in capitals": (
        {
            "chosen": [{"from": "Human", "value": "sky?"}, {"from": "GPT", "value": "blue"}],
            "rejected": [{"from": "Human", "value": "sky?"}, {"from": "GPT", "value": "green"}],
        },
        "implicit",
        explicit(ASK),
    ),
    "messages and a system field": (
        {"messages": ASK, "chosen": BLUE, "rejected": GREEN, "system": "be brief"},
        "messages",
        explicit([system("be brief"), *ASK]),
    ),
    "a prompt of turns and answers of text": (
        {"prompt": ASK, "chosen": "blue", "rejected": "green"},
        "messages",
        explicit(ASK),
    ),
    "a prompt of text and answers of turns": (
        {"prompt": "sky?", "chosen": [BLUE], "rejected": [GREEN]},
        "messages",
        explicit(ASK),
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "system", "value": "s"}, human("sky?")],
            "chosen": gpt("blue"),
            "rejected": gpt("green"),
        },
        "sharegpt",
        explicit([system("s"), *ASK]),
    ),
    "sharegpt with several rounds, its system beside it": (
        {
            "conversations": [human("hi"), gpt("hello"), human("sky?")],
            "system": "s",
            "chosen": gpt("blue"),
            "rejected": gpt("green"),
        },
        "sharegpt",
        explicit([system("s"), *EARLIER, *ASK]),
    ),
    "alpaca": (
        {"instruction": "sky?", "input": "", "chosen": "blue", "rejected": "green"},
        "alpaca",
        explicit(ASK),
    ),
    "alpaca with everything": (
        {
            "system": "s",
            "history": [["hi", "hello"]],
            "instruction": "What colour?",
            "input": "the sky",
            "chosen": "blue",
            "rejected": "green",
        },
        "alpaca",
        explicit([system("s"), *EARLIER, user("What colour?\nthe sky")]),
    ),
    "instruction with responses": (
        {"instruction": "sky?", "chosen_response": "blue", "rejected_response": "green"},
        "alpaca",
        explicit(ASK),
    ),
    "input alone": (
        {"system": "s", "input": "sky?", "chosen": "blue", "rejected": "green"},
        "alpaca",
        explicit([system("s"), *ASK]),
    ),
    "question": (
        {"system": "s", "question": "sky?", "chosen": "blue", "rejected": "green"},
        "question",
        explicit([system("s"), *ASK]),
    ),
    "question, no system": (
        {"system": "", "question": "sky?", "chosen": "blue", "rejected": "green"},
        "question",
        explicit(ASK),
    ),
    "swift with a response": (
        {"messages": [*EARLIER, *ASK, BLUE], "rejected_response": "green"},
        "swift",
        explicit([*EARLIER, *ASK]),
    ),
    "swift with messages": (
        {"messages": [*ASK, BLUE], "rejected_messages": [*ASK, GREEN]},
        "swift",
        explicit(ASK),
    ),
    "json text, implicit": (
        {"chosen": json.dumps([*ASK, BLUE]), "rejected": json.dumps([*ASK, GREEN], indent=1)},
        "implicit",
        explicit(ASK),
    ),
    "json text, explicit": (
        {
            "prompt": json.dumps(ASK),
            "chosen": json.dumps([BLUE]),
            "rejected": json.dumps([GREEN]),
        },
        "explicit",
        explicit(ASK),
    ),
    "json text, ultrafeedback": (
        {
            "prompt": "sky?",
            "chosen": json.dumps([*ASK, BLUE]),
            "rejected": json.dumps([*ASK, GREEN]),
        },
        "ultrafeedback",
        explicit(ASK),
    ),
    "json text, sharegpt": (
        {
            "conversations": json.dumps([human("sky?")]),
            "chosen": json.dumps(gpt("blue")),
            "rejected": json.dumps(gpt("green")),
        },
        "sharegpt",
        explicit(ASK),
    ),
    "the prompt stands in the sides, too": (
        {"prompt": [*EARLIER, *ASK], "chosen": [*ASK, BLUE], "rejected": [*ASK, GREEN]},
        "explicit",
        explicit([*EARLIER, *ASK]),
    ),
    "a system prompt before whole conversations": (
        {"prompt": [system("s")], "chosen": [*ASK, BLUE], "rejected": [*ASK, GREEN]},
        "explicit",
        explicit([system("s"), *ASK]),
    ),
}


def ids(pairs):
    return [{name: value.tolist() for name, value in pair.items()} for pair in pairs]


def ways(row, tok, tmp_path, **options):
    """The pairs of one row as a dict, as JSONL and as an Arrow table."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    yield PairDataset.from_rows([row], tok, **options)
    yield PairDataset.from_files(path, tok, **options)
    yield PairDataset.from_arrow(pa.Table.from_pylist([row]), tok, **options)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_gives_what_trls_layout_gives(tok, tmp_path, name):
    row, layout, same = ROWS[name]
    want = ids(PairDataset.from_rows([same], tok))
    for pairs in ways(row, tok, tmp_path):
        assert ids(pairs) == want
        assert pairs.report.layouts == {layout: 1}
    for pairs in ways(row, tok, tmp_path, layout_of_rows=layout):
        assert ids(pairs) == want


def test_mixed_layouts_are_found_row_by_row(tok):
    rows = [row for row, _, _ in ROWS.values()]
    pairs = PairDataset.from_rows(rows, tok)
    assert ids(pairs) == ids(PairDataset.from_rows([same for _, _, same in ROWS.values()], tok))
    assert sum(pairs.report.layouts.values()) == pairs.report.kept == len(ROWS)
    assert "layout alpaca: 5" in str(pairs.report)
    # A table of them all has every column, null where a row has it not.
    uniform = {
        n: r
        for n, r in ROWS.items()
        if "json" not in n and n.startswith(("alpaca", "question", "swift"))
    }
    keys = sorted({key for row, _, _ in uniform.values() for key in row})
    table = pa.Table.from_pylist(
        [{key: row.get(key) for key in keys} for row, _, _ in uniform.values()]
    )
    got = PairDataset.from_arrow(table, tok)
    assert ids(got) == ids(PairDataset.from_rows([same for _, _, same in uniform.values()], tok))


def test_a_call_of_a_function_and_its_answer_are_read_from_sharegpt(tmp_path):
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tok = tokenizer(tmp_path / "m", template=template)
    row = {
        "conversations": [
            human("look"),
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": "clouds"},
        ],
        "chosen": gpt("blue"),
        "rejected": gpt("green"),
    }
    pairs = PairDataset.from_rows([row], tok)
    text = decode(pairs[0]["prompt_ids"].tolist())
    assert text == '[user]look[assistant]look{"at": "sky"}[tool]clouds[assistant]'


TRANSCRIPT = "\n\nHuman: {}\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "prompt", "warned"),
    [
        # a prompt that stands in the sides once more is cut there
        ({"prompt": "What is it?", "chosen": "What is it? A", "rejected": "What is it? B"}, "What is it?", {"prompt_in_sides"}),
        ({"prompt": TRANSCRIPT.format("q"), "chosen": TRANSCRIPT.format("q") + " a", "rejected": TRANSCRIPT.format("q") + " b"}, TRANSCRIPT.format("q"), {"prompt_in_sides"}),
        # a word may begin any answer
        ({"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi you"}, "Hi", set()),
        ({"prompt": "s.", "chosen": TRANSCRIPT.format("q") + " a", "rejected": TRANSCRIPT.format("q") + " b"}, "s." + TRANSCRIPT.format("q"), set()),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "system": "s"}, "q", {"unread_system"}),
        # a transcript beside which its question stands
        ({"question": "q", "chosen": TRANSCRIPT.format("q") + " a", "rejected": TRANSCRIPT.format("q") + " b"}, TRANSCRIPT.format("q"), set()),
    ],
)  # fmt: skip
def test_texts(tok, row, prompt, warned):
    pairs = PairDataset.from_rows([row], tok)
    assert decode(pairs[0]["prompt_ids"].tolist()) == prompt
    assert set(pairs.report.warned) == warned


# name -> (row, reason, field, what the error says)
BAD = {
    "other questions": (
        {"chosen": [user("2?"), BLUE], "rejected": [user("3?"), GREEN]},
        "different_prompts", "rejected", "Z(x) does not cancel",
    ),
    "other second questions": (
        {"chosen": [*EARLIER, user("2?"), BLUE], "rejected": [*EARLIER, user("3?"), GREEN]},
        "different_prompts", "rejected", "message 3",
    ),
    "other system turns": (
        {"chosen": [system("a"), *ASK, BLUE], "rejected": [system("b"), *ASK, GREEN]},
        "different_prompts", "rejected", "message 1",
    ),
    "a question and none": (
        {"chosen": [*EARLIER, user("2?"), BLUE], "rejected": [*EARLIER, GREEN]},
        "different_prompts", "rejected", "message 3",
    ),
    "other questions behind a prompt": (
        {"prompt": [system("s")], "chosen": [user("2?"), BLUE], "rejected": [user("3?"), GREEN]},
        "different_prompts", "rejected", "message 2",
    ),
    "other questions in text": (
        {"chosen": TRANSCRIPT.format("2?") + " 4", "rejected": TRANSCRIPT.format("3?") + " 7"},
        "different_prompts", "rejected", "Z(x) does not cancel",
    ),
    "a trailing space that is printed": (
        {"chosen": [user("2? "), BLUE], "rejected": [user("2?"), GREEN]},
        "different_prompts", "rejected", "message 1",
    ),
    "a prompt text that no turn has": (
        {"prompt": "sea?", "chosen": [*ASK, BLUE], "rejected": [*ASK, GREEN]},
        "different_prompts", "prompt", "none of them",
    ),
    "no answer behind the question": (
        {"chosen": ASK, "rejected": [*ASK, GREEN]}, "empty_completion", "chosen", "answer",
    ),
    "nothing shared in text": (
        {"chosen": "Right", "rejected": "Wrong", "ask": "Is it?", "n": 1},
        "missing_prompt", "prompt", "`ask`",
    ),
    "nothing shared in turns": (
        {"chosen": [BLUE], "rejected": [GREEN]}, "missing_prompt", "prompt", "completions",
    ),
    "a speaker that nobody knows": (
        {"conversations": [{"from": "narrator", "value": "x"}], "chosen": gpt("a"), "rejected": gpt("b")},
        "bad_messages", "conversations", "narrator",
    ),
    "a turn without a value": (
        {"conversations": [{"from": "human"}], "chosen": gpt("a"), "rejected": gpt("b")},
        "bad_messages", "conversations", "`value`",
    ),
    "a call that is no JSON": (
        {"conversations": [human("q"), {"from": "function_call", "value": "look()"}], "chosen": gpt("a"), "rejected": gpt("b")},
        "bad_messages", "conversations", "message 2",
    ),
    "turns as Python prints them": (
        {"chosen": str([*ASK, BLUE]), "rejected": str([*ASK, GREEN])},
        "bad_messages", "chosen", "json.dumps",
    ),
    "turns in broken JSON": (
        {"chosen": json.dumps([*ASK, BLUE])[:-1], "rejected": json.dumps([*ASK, GREEN])},
        "bad_messages", "chosen", "no JSON",
    ),
    "turns in JSON on one side": (
        {"prompt": "q", "chosen": json.dumps([*ASK, BLUE]), "rejected": "green"},
        "bad_messages", "chosen", "the other side",
    ),
    "alpaca, a list as instruction": (
        {"instruction": ["a"], "chosen": "a", "rejected": "b"}, "wrong_type", "instruction", "string",
    ),
    "alpaca, no rejected": (
        {"instruction": "q", "chosen": "a"}, "missing_field", "rejected", "none",
    ),
    "alpaca, a round of three": (
        {"instruction": "q", "history": [["a", "b", "c"]], "chosen": "a", "rejected": "b"},
        "bad_messages", "history", "pair 1",
    ),
    "alpaca, history of text": (
        {"instruction": "q", "history": ["a"], "chosen": "a", "rejected": "b"}, "wrong_type", "history", "pairs",
    ),
    "swift, a question last": (
        {"messages": ASK, "rejected_response": "green"}, "bad_messages", "messages", "chosen answer",
    ),
    "swift, an answer alone": (
        {"messages": [BLUE], "rejected_response": "green"}, "bad_messages", "messages", "prompt",
    ),
    "one answer and its label": (
        {"prompt": "q", "completion": "a", "label": True}, "missing_field", "chosen", "`completion`",
    ),
    "messages of numbers": (
        {"messages": [1], "chosen": BLUE, "rejected": GREEN}, "bad_messages", "messages", "message 1",
    ),
    "no messages": (
        {"messages": [], "chosen": BLUE, "rejected": GREEN}, "bad_messages", "messages", "empty list",
    ),
    "a system of numbers": (
        {"question": "q", "system": 5, "chosen": "a", "rejected": "b"}, "wrong_type", "system", "string",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_is_no_pair_says_why(tok, tmp_path, name):
    row, reason, field, said = BAD[name]
    good = ROWS["implicit"][0]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, [good, row])), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        PairDataset.from_files(path, tok)
    error = caught.value
    assert (error.reason, error.line, error.field, error.path) == (reason, 2, field, str(path))
    assert said in str(error)
    for pairs in (
        PairDataset.from_files(path, tok, on_bad="skip"),
        PairDataset.from_rows([good, row], tok, on_bad="skip"),
    ):
        assert pairs.report.dropped == {reason: 1}
        assert said in pairs.report.first[reason].message


def test_rows_of_questions_need_a_template_or_a_key(plain):
    row = {"question": "Is it?", "chosen": "yes", "rejected": "no"}
    with pytest.raises(DataError, match='prompt_key="question"') as caught:
        PairDataset.from_rows([row], plain)
    assert (caught.value.reason, caught.value.field) == ("template_error", "question")
    pairs = PairDataset.from_rows([row], plain, prompt_key="question")
    assert decode(pairs[0]["prompt_ids"].tolist()) == "Is it?"


def test_pairs_without_any_prompt_are_kept_where_the_layout_says_so(tok):
    rows = [{"chosen": "Right", "rejected": "Wrong"}, {"chosen": [BLUE], "rejected": [GREEN]}]
    pairs = PairDataset.from_rows(rows, tok, layout_of_rows="completions")
    assert pairs[0]["prompt_ids"].tolist() == []
    assert decode(pairs[0]["chosen_ids"].tolist()).startswith("Right")
    assert "blue" in decode(pairs[1]["chosen_ids"].tolist())
    assert pairs.report.layouts == {"completions": 2}


@pytest.mark.parametrize("name", ["query", "question"])
def test_empty_prompts_all_along_are_an_error_that_names_the_fields_with_text(tok, tmp_path, name):
    rows = [{"prompt": "", name: "sky?", "chosen": "blue", "rejected": "green"}] * 3
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for load in (
        lambda **o: PairDataset.from_rows(rows, tok, **o),
        lambda **o: PairDataset.from_files(path, tok, **o),
        lambda **o: PairDataset.from_arrow(pa.Table.from_pylist(rows), tok, **o),
        lambda **o: PairDataset.from_files(path, tok, cache_dir=tmp_path / "cache", **o),
    ):
        with pytest.raises(DataError, match=rf"every prompt of .* is empty, .* `{name}`") as caught:
            load()
        assert caught.value.reason == "missing_prompt"
        assert load(layout_of_rows="explicit").report.warned == {"empty_prompt": 3}
        assert load(prompt_key="prompt").report.kept == 3
    with_one = [*rows, {**rows[0], "prompt": "q"}]
    assert PairDataset.from_rows(with_one, tok).report.warned == {"empty_prompt": 3}
    bare = [{key: value for key, value in row.items() if key != name} for row in rows]
    assert PairDataset.from_rows(bare, tok).report.kept == 3


def test_a_question_that_both_answers_quote_is_a_question_still(tok):
    row = {"system": "s", "question": "sky?", "chosen": "sky? blue", "rejected": "sky? green"}
    want = explicit([system("s"), *ASK], [assistant("sky? blue")], [assistant("sky? green")])
    assert ids(PairDataset.from_rows([row], tok)) == ids(PairDataset.from_rows([want], tok))
    ask = TRANSCRIPT.format("What is it?")
    other = {"input": "ctx 17", "chosen": ask + " a", "rejected": ask + " b"}
    pairs = PairDataset.from_rows([other], tok)
    assert (pairs.report.layouts, decode(pairs[0]["prompt_ids"].tolist())) == ({"implicit": 1}, ask)


def test_a_prompt_of_null_is_none_where_the_row_has_another(tok):
    rows = [
        {"prompt": None, "question": "sky?", "chosen": "blue", "rejected": "green"},
        {"prompt": None, "chosen": [*ASK, BLUE], "rejected": [*ASK, GREEN]},
        {"prompt": None, "messages": ASK, "chosen": BLUE, "rejected": GREEN},
    ]
    assert ids(PairDataset.from_rows(rows, tok)) == 3 * ids(
        PairDataset.from_rows([explicit(ASK)], tok)
    )
    with pytest.raises(DataError, match="found null"):
        PairDataset.from_rows([{"prompt": None, "chosen": "The sky", "rejected": "The sea"}], tok)


def weighed(turn, weight):
    return {**turn, "weight": weight, "loss": {"on": weight}}


# What the template does not print of a turn, as the chosen and the rejected side have it.
UNPRINTED = {
    "the order of keys": (dict, lambda turn: dict(reversed(turn.items()))),
    "an id": (dict, lambda turn: {"id": 7, **turn}),
    "a null": (dict, lambda turn: {**turn, "name": None}),
    "a weight": (lambda turn: weighed(turn, 1), lambda turn: weighed(turn, 0.5)),
    "a whole number": (lambda turn: weighed(turn, 1), lambda turn: weighed(turn, 1.0)),
}


@pytest.mark.parametrize("name", UNPRINTED)
@pytest.mark.parametrize("turn", [0, 1, 2])
def test_turns_that_are_printed_alike_are_the_prompt(tok, tmp_path, name, turn):
    shared = [*EARLIER, *ASK]
    chosen, rejected = (
        [change(one) if i == turn else one for i, one in enumerate(shared)]
        for change in UNPRINTED[name]
    )
    row = {"chosen": [*chosen, BLUE], "rejected": [*rejected, GREEN]}
    want = ids(PairDataset.from_rows([explicit(shared)], tok))
    for options in ({}, {"boundary": "trl"}):
        for pairs in ways(row, tok, tmp_path, **options):
            assert ids(pairs) == want
            assert pairs.report.warned == {}


DEFAULT = (
    "{% if messages[0].role != 'system' %}<|turn|>system\nbe kind<|end|>\n{% endif %}" + TEMPLATE
)


@pytest.mark.parametrize("boundary", ["joint", "trl"])
def test_a_system_turn_that_the_template_writes_itself_is_the_same_as_one_that_stands_there(
    tmp_path, boundary
):
    tok = tokenizer(tmp_path / "m", template=DEFAULT)
    given = [system("be kind"), *EARLIER, *ASK]
    want = ids(PairDataset.from_rows([explicit(given)], tok, boundary=boundary))
    for chosen, rejected in ((given, given[1:]), (given[1:], given)):
        row = {"chosen": [*chosen, BLUE], "rejected": [*rejected, GREEN]}
        for pairs in ways(row, tok, tmp_path, boundary=boundary):
            assert ids(pairs) == want
            assert pairs.report.warned == {}
    other = [system("be rude"), *given[1:]]
    with pytest.raises(DataError) as caught:
        PairDataset.from_rows(
            [{"chosen": [*other, BLUE], "rejected": [*given[1:], GREEN]}], tok, boundary=boundary
        )
    assert caught.value.reason == "different_prompts"


def test_a_list_of_text_and_its_text_are_the_same_turn_under_a_template_of_strings(tok):
    listed = {"role": "user", "content": [{"type": "text", "text": "sky?"}]}
    want = ids(PairDataset.from_rows([explicit(ASK)], tok))
    for chosen, rejected in (([listed], ASK), (ASK, [listed])):
        row = {"chosen": [*chosen, BLUE], "rejected": [*rejected, GREEN]}
        assert ids(PairDataset.from_rows([row], tok)) == want


WHOLE = [[user("u1"), assistant("a1"), user("u2"), assistant(last)] for last in ("b", "c")]


@pytest.mark.parametrize(
    ("prompt", "sides"),
    [
        ([user("hi")], [[system("S"), user("hi"), assistant(x)] for x in ("b", "c")]),
        ([user("u1"), assistant("b")], [[user("u1"), assistant(x)] for x in ("b", "c")]),
        ([user("u2")], WHOLE),
        ([user("u1")], WHOLE),
        (WHOLE[0], WHOLE),
        (WHOLE[0][:3], WHOLE),
    ],
)
def test_sides_that_hold_the_prompt_are_whole_conversations(tok, prompt, sides):
    chosen, rejected = sides
    pairs = PairDataset.from_rows([explicit(prompt, chosen, rejected)], tok)
    want = PairDataset.from_rows([{"chosen": chosen, "rejected": rejected}], tok)
    assert ids(pairs) == ids(want)
    assert pairs.report.warned == {"prompt_in_sides": 1}


def test_a_prompt_with_turns_that_no_side_has_is_no_part_of_them(tok):
    """ "ok" is asked twice: nothing that the prompt says may go."""
    prompt = [user("ok"), assistant("first"), user("more")]
    row = explicit(prompt, [user("ok"), BLUE], [user("ok"), GREEN])
    want = explicit([*prompt, user("ok")])
    assert ids(PairDataset.from_rows([row], tok)) == ids(PairDataset.from_rows([want], tok))


def test_sides_hold_a_prompt_that_they_print_alike(tmp_path):
    strips = TEMPLATE.replace("message['content']", "message['content'] | trim")
    tok = tokenizer(tmp_path / "m", template=strips)
    sides = [[system("S"), user(" hi"), assistant(x)] for x in ("b", "c")]
    pairs = PairDataset.from_rows([explicit([user("hi ")], *sides)], tok)
    want = PairDataset.from_rows([{"chosen": sides[0], "rejected": sides[1]}], tok)
    assert ids(pairs) == ids(want)


@pytest.mark.parametrize("field", ["messages", "conversations", "conversation"])
def test_turns_beside_whole_transcripts_are_not_asked_again(tok, field):
    text = {"chosen": "Human: q\n\nAssistant: b", "rejected": "Human: q\n\nAssistant: c"}
    turns = [human("q")] if field == "conversations" else [user("q")]
    pairs = PairDataset.from_rows([{field: turns, **text}], tok)
    assert ids(pairs) == ids(PairDataset.from_rows([text], tok))
    assert pairs.report.unread == (field,)
    with pytest.raises(DataError) as caught:
        PairDataset.from_rows([{"prompt": turns, **text}], tok)
    assert (caught.value.reason, caught.value.field) == ("wrong_type", "prompt")


def test_a_question_behind_a_prompt_that_the_sides_do_not_hold_is_the_prompts_last(tok):
    row = explicit([system("S")], [user("q"), BLUE], [user("q"), GREEN])
    want = explicit([system("S"), user("q")])
    assert ids(PairDataset.from_rows([row], tok)) == ids(PairDataset.from_rows([want], tok))


def test_what_one_side_alone_says_and_nobody_prints_is_not_lost(tmp_path):
    no_system = (
        "{% for message in messages if message['role'] != 'system' %}"
        + TEMPLATE.partition(" %}")[2]
    )
    tok = tokenizer(tmp_path / "m", template=no_system)
    rude, plain = [system("Always be rude and lie."), *ASK], ASK
    for chosen, rejected in ((rude, plain), (plain, rude), ([system(""), *ASK], rude)):
        with pytest.raises(DataError) as caught:
            PairDataset.from_rows(
                [{"chosen": [*chosen, BLUE], "rejected": [*rejected, GREEN]}], tok
            )
        assert caught.value.reason == "content_dropped"


@pytest.mark.parametrize(
    "logged",
    [{"role": "assistant", "content": "blue", "id": 1}, {"content": "blue", "role": "assistant"}],
)
@pytest.mark.parametrize("field", ["p", "messages"])
def test_a_logged_answer_is_cut_however_it_is_spelt(tok, logged, field):
    row = {field: [*ASK, logged], "chosen": "blue", "rejected": "green"}
    options = {"prompt_key": "p"} if field == "p" else {}
    pairs = PairDataset.from_rows([row], tok, **options)
    assert ids(pairs) == ids(PairDataset.from_rows([explicit(ASK)], tok))
    assert pairs.report.warned == {"prompt_in_sides": 1}
    with pytest.raises(DataError, match="an answer of neither side"):
        PairDataset.from_rows([{**row, "chosen": "red"}], tok, **options)


def test_an_answer_that_is_called_chosen_comes_before_the_one_that_was_logged(tok):
    answers = {"chosen_response": "blue", "rejected_response": "green"}
    want = ids(PairDataset.from_rows([explicit(ASK)], tok))
    for row in (
        {"query": "sky?", "response": "orig", **answers},
        {"instruction": "sky?", "response": "orig", **answers},
        {"messages": ASK, **answers},
        {"conversation": ASK, **answers},
    ):
        assert ids(PairDataset.from_rows([row], tok)) == want


def test_an_empty_conversation_is_none_where_something_is_asked(tok):
    want = ids(PairDataset.from_rows([explicit(ASK)], tok))
    for asks in ("query", "question", "instruction", "input"):
        row = {"messages": [], asks: "sky?", "chosen": "blue", "rejected": "green"}
        assert ids(PairDataset.from_rows([row], tok)) == want
    with pytest.raises(DataError, match="at least one message"):
        PairDataset.from_rows([{"messages": [], "chosen": "blue", "rejected": "green"}], tok)


def test_a_question_is_asked_and_not_the_input_beside_it(tok):
    want = ids(PairDataset.from_rows([explicit(ASK)], tok))
    for asks in ("query", "question"):
        row = {"input": "[INST] sky? [/INST]", asks: "sky?", "chosen": "blue", "rejected": "green"}
        pairs = PairDataset.from_rows([row], tok)
        assert ids(pairs) == want
        assert pairs.report.unread == ("input",)


@pytest.mark.parametrize("alike", [True, False])
def test_three_thousand_turns_of_other_spellings_are_shared_in_no_time(tok, alike):
    def spelt(name):
        said = ["yes" if alike else f"turn {i}" for i in range(3001)]
        roles = ["user", "assistant"]
        return [{"role": roles[i % 2], "content": text, name: i} for i, text in enumerate(said)]

    sides = {"chosen": [*spelt("a"), BLUE], "rejected": [*spelt("b"), GREEN]}
    options = {"max_length": None, "truncation": "error"}
    begin = time.process_time()
    pairs = PairDataset.from_rows([sides], tok, **options)
    twice = PairDataset.from_rows([{"prompt": spelt("p"), **sides}], tok, **options)
    took = time.process_time() - begin
    bare = [{name: turn[name] for name in ("role", "content")} for turn in spelt("a")]
    assert ids(pairs) == ids(twice) == ids(PairDataset.from_rows([explicit(bare)], tok, **options))
    # Rendered anew for each turn they took six seconds to a minute.
    assert took < 3


def test_an_id_under_the_name_of_a_conversation_is_none(tok):
    text = {"chosen": "Human: q\n\nAssistant: b", "rejected": "Human: q\n\nAssistant: c"}
    want = ids(PairDataset.from_rows([text], tok))
    for name in (77, "id-77"):
        assert ids(PairDataset.from_rows([{"conversation": name, **text}], tok)) == want


@pytest.mark.parametrize(
    "begin", ["### Human: q\n\n### Assistant:", "### Instruction:\nq\n\n### Response:\n"]
)
def test_a_query_beside_whole_transcripts_is_not_asked_again(tok, begin):
    text = {"chosen": begin + " b", "rejected": begin + " c"}
    want = ids(PairDataset.from_rows([text], tok))
    assert ids(PairDataset.from_rows([{"query": "q", **text}], tok)) == want


def test_names_of_fields_are_printed_without_what_a_terminal_would_do(tok):
    row = {**explicit(ASK), "\x1b[31mred\nnote: fake": "x", "empty": ""}
    report = PairDataset.from_rows([row], tok).report
    assert report.unread == ("\x1b[31mred\nnote: fake",)
    assert "\x1b" not in str(report)


def test_lists_that_the_template_prints_right_are_not_joined(tmp_path):
    """This one prints parts of a user with words between them, and an answer as a string alone."""
    tok = tokenizer(
        tmp_path / "m",
        template="{% for m in messages %}<|turn|>{% if m.role == 'user' and m.content is not string %}"
        "{% for p in m.content %}({{ p.text }}){% endfor %}{% else %}{{ m.content }}{% endif %}<|end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|turn|>{% endif %}",
    )

    def parts(*texts):
        return [{"type": "text", "text": text} for text in texts]

    asked = {"role": "user", "content": parts("is it", "blue?")}
    row = explicit([asked], [assistant(parts("y", "es"))], [assistant("no")])
    (pair,) = PairDataset.from_rows([row], tok)
    assert decode(pair["prompt_ids"]) == "<|turn|>(is it)(blue?)<|end|>\n<|turn|>"
    assert decode(pair["chosen_ids"]) == "yes<|end|>\n"


def test_a_prompt_that_is_named_may_be_turns_beside_answers(tok):
    row = {"dialogue": ASK, "chosen": "blue", "rejected": "green"}
    pairs = PairDataset.from_rows([row], tok, prompt_key="dialogue")
    assert ids(pairs) == ids(PairDataset.from_rows([explicit(ASK)], tok))
    with pytest.raises(DataError, match="`dialogue`") as caught:
        PairDataset.from_rows([{**row, "dialogue": None}], tok, prompt_key="dialogue")
    assert caught.value.field == "dialogue"


def test_fields_with_text_that_nobody_reads_are_named(tok, tmp_path):
    row = {
        **explicit(ASK),
        "context": "it is noon",
        "question": "other?",
        "history": [["a", "b"]],
        "source": "",
        "score": 3,
        "carried": "x",
        "left": "y",
        "output": None,
    }
    options = {"columns": ("carried",), "ignore_columns": ("left",)}
    for pairs in ways(row, tok, tmp_path, **options):
        assert set(pairs.report.unread) - {"source"} == {"context", "history", "question"}
        assert "not read: context" in str(pairs.report)
    assert PairDataset.from_rows([explicit(ASK)], tok).report.unread == ()
    many = {f"field {i}": "text" for i in range(100)} | explicit(ASK)
    for pairs in ways(many, tok, tmp_path):
        assert len(pairs.report.unread) == 32


@pytest.mark.parametrize("frame", ["pandas", "polars", "categories", "runs", "array interface"])
def test_fields_that_nobody_reads_are_named_of_every_kind_of_table(tok, frame):
    columns = {"prompt": ["q"], "chosen": [" b"], "rejected": [" c"]}
    context = pa.array(["noon"])
    if frame in ("pandas", "polars"):
        table = pytest.importorskip(frame).DataFrame({**columns, "context": ["noon"]})
    elif frame == "array interface":
        batch = pa.record_batch({**columns, "context": context})

        class Bare:
            schema = "of another kind"
            __arrow_c_array__ = batch.__arrow_c_array__

        table = Bare()
    else:
        encoded = {"categories": "dictionary_encode", "runs": None}[frame]
        column = (
            context.dictionary_encode()
            if encoded
            else pa.RunEndEncodedArray.from_arrays([1], context)
        )
        table = pa.table({**columns, "context": column})
    assert PairDataset.from_arrow(table, tok).report.unread == ("context",)


@pytest.mark.parametrize("layout", ["completions", "implicit"])
def test_a_prompt_that_the_layout_of_the_caller_leaves_out_is_named(tok, layout):
    row = {
        "prompt": "other",
        "chosen": "Human: q\n\nAssistant: b",
        "rejected": "Human: q\n\nAssistant: c",
    }
    assert PairDataset.from_rows([row], tok, layout_of_rows=layout).report.unread == ("prompt",)


def test_a_prompt_whose_only_token_merges_is_no_empty_field(tok):
    rows = [{"prompt": "a", "chosen": f"a{i}", "rejected": f"ab{i}", "id": "x"} for i in range(3)]
    pairs = PairDataset.from_rows(rows, tok)
    assert pairs.report.warned["empty_prompt"] == pairs.report.warned["boundary_merge"] == 3


def test_white_space_that_is_stripped_is_no_difference(tmp_path):
    strips = TEMPLATE.replace("message['content']", "message['content'] | trim")
    tok = tokenizer(tmp_path / "m", template=strips)
    row = {"chosen": [user("sky? "), BLUE], "rejected": [user("\nsky?"), GREEN]}
    assert ids(PairDataset.from_rows([row], tok)) == ids(
        PairDataset.from_rows([explicit(ASK)], tok)
    )


def test_a_prompt_that_stands_twice_is_found_by_its_render(tmp_path):
    tok = tokenizer(
        tmp_path / "m", template=TEMPLATE.replace("message['content']", "message['content'] | trim")
    )
    want = ids(PairDataset.from_rows([explicit(ASK)], tok))
    for prompt in ([{**ASK[0], "id": 1}], [user("sky? ")], [dict(reversed(ASK[0].items()))]):
        pairs = PairDataset.from_rows([explicit(prompt, [*ASK, BLUE], [*ASK, GREEN])], tok)
        assert ids(pairs) == want
        assert pairs.report.warned == {"prompt_in_sides": 1}


def test_a_layout_that_is_named_is_the_only_one(tok):
    row = {**ROWS["ultrafeedback"][0], "question": "other?"}
    for layout in ("implicit", "ultrafeedback"):
        pairs = PairDataset.from_rows([row], tok, layout_of_rows=layout)
        assert ids(pairs) == ids(PairDataset.from_rows([explicit(ASK)], tok))
    with pytest.raises(DataError) as caught:
        PairDataset.from_rows([row], tok, layout_of_rows="sharegpt")
    assert (caught.value.reason, caught.value.field) == ("missing_field", "conversations")
    with pytest.raises(ValueError, match="unknown `layout_of_rows` 'hh'"):
        PairDataset.from_rows([row], tok, layout_of_rows="hh")
    with pytest.raises(ValueError, match="`prompt_key` names a field of"):
        PairDataset.from_rows([row], tok, layout_of_rows="alpaca", prompt_key="x")


def test_ignored_columns_are_not_there(tok):
    row = {
        "messages": [user("other")],
        "chosen": [*ASK, BLUE],
        "rejected": [*ASK, GREEN],
        "images": ["a"],
    }
    pairs = PairDataset.from_rows([row], tok, ignore_columns=("messages", "images"))
    assert pairs.report.layouts == {"implicit": 1}
    for bad in (("chosen",), ("mine",)):
        with pytest.raises(ValueError, match="which is read"):
            PairDataset.from_rows([row], tok, ignore_columns=bad, columns=("mine",))
    with pytest.raises(TypeError, match="`ignore_columns` must be a sequence"):
        PairDataset.from_rows([row], tok, ignore_columns="messages")


def test_a_field_of_a_layout_can_be_carried_along(tok):
    row = {"question": "sky?", "chosen": "blue", "rejected": "green", "image": "sky.png"}
    pairs = PairDataset.from_rows([row], tok, columns=("question", "image"))
    want = PairDataset.from_rows([explicit(ASK)], tok)
    assert pairs[0]["prompt_ids"].tolist() == want[0]["prompt_ids"].tolist()
    assert pairs.columns["question"].tolist() == ["sky?"]
    assert pairs.columns["image"].tolist() == ["sky.png"]


MISSING = object()
FAULTS = {
    "missing": MISSING, "null": None, "number": 7, "bool": True, "float": 1.5, "empty": "", "blank": "  ", "list": [],
    "object": {}, "list of a number": [7], "list of null": [None], "list of a list": [[]], "list of an object": [{}],
    "another object": {"a": 1}, "role of a number": [{"role": 5, "content": "x"}], "no content": [{"role": "user"}],
    "null content": [{"role": "user", "content": None}], "no value": [{"from": "human"}], "text": "other text",
    "broken json": '[{"role": "user"', "an answer": [{"role": "assistant", "content": "an answer"}],
}  # fmt: skip
# Fields that nobody reads in these rows.
UNREAD = {"prompt_id", "score_chosen", "score_rejected"}
REASONS = {
    "bad_messages", "wrong_type", "missing_field", "missing_prompt", "different_prompts", "empty_completion", "identical_pair",
}  # fmt: skip


def leaves(value):
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("role", "from"):
                yield from leaves(item)


def said_by(row, layout):
    read = {name: value for name, value in row.items() if name not in UNREAD}
    if layout in ("ultrafeedback", "implicit"):
        read.pop("messages", None)
    return {text for value in read.values() for text in leaves(value) if text}


@pytest.mark.parametrize("name", [name for name in ROWS if "json" not in name])
def test_a_field_with_a_fault_makes_a_bad_row_or_is_wholly_read(tok, name):
    """Over 1,000 rows: 0 panics, and of what is kept every text stands in the ids."""
    row, bad = ROWS[name][0], []
    for field, (fault, value) in itertools.product(row, FAULTS.items()):
        given = {key: v for key, v in row.items() if key != field}
        if value is not MISSING:
            given[field] = value
        where = (field, fault)
        try:
            pairs = PairDataset.from_rows([given], tok)
        except DataError as error:
            bad.append((where, error))
            continue
        pair = pairs[0]
        prompt, chosen, rejected = (
            decode(pair[key].tolist()) for key in ("prompt_ids", "chosen_ids", "rejected_ids")
        )
        (layout,) = pairs.report.layouts
        for text in said_by(given, layout):
            assert text in prompt + chosen or text in prompt + rejected, where
        assert "'role'" not in prompt + chosen + rejected, where
    assert len(bad) >= 10
    for where, error in bad:
        assert error.reason in REASONS, where
        assert error.line == 1, where
        assert error.field is not None, where
