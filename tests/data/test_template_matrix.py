"""Templates by kinds of row: the ids of transformers and TRL, or both refuse, or what is refused is not in the render.

The templates are those that TRL ships and the written ones. What a template leaves out is found
here in its own way: by words set before and behind each text, in a render of transformers.
"""

from __future__ import annotations

import copy
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from row_kinds import KINDS, parts, row, say
from row_shapes import ROW_SHAPES
from template_shapes import SHAPES, as_ours

from dpo_ext import DataError, PairDataset

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("transformers") is None, reason="no transformers"),
    pytest.mark.filterwarnings(
        "ignore:the chat template is rendered by transformers:RuntimeWarning"
    ),
]


def of_trl():
    """The templates in the wheel of TRL, if it is installed and has some."""
    spec = find_spec("trl")
    places = spec.submodule_search_locations if spec else None
    files = sorted(Path(places[0]).glob("chat_templates/*.jinja")) if places else []
    return {f"trl/{file.stem}": file.read_text(encoding="utf-8") for file in files}


TEMPLATES = SHAPES | ROW_SHAPES | of_trl()
SIDES = ("chosen", "rejected")
# They change lists, which jinja2's sandbox forbids, or print no whole answer.
LOSING = {"list_methods", "dict_update", "scopes", "slices"}
OF_PARTS = {"parts_only", "parts_selected"} | {
    f"trl/{name}{end}"
    for name in ("idefics3", "llava_next", "smolvlm")
    for end in ("", "_training")
}


class Refused(Exception):  # noqa: N818
    """transformers does not render it."""


def common_prefix_length(a, b):
    parted = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(parted, min(len(a), len(b)))


class Row:
    """A row and what transformers makes of it."""

    def __init__(self, theirs, row, memory):
        self.row = row
        self.theirs = theirs
        self.memory = memory
        tools = row.get("tools")
        self.tools = json.loads(tools) if isinstance(tools, str) else tools
        self.kwargs = row.get("chat_template_kwargs") or {}
        if "prompt" in row:
            self.prompt, self.sides = row["prompt"], [row[name] for name in SIDES]
        else:
            self.prompt, self.sides = row["chosen"][:-1], [row[name][-1:] for name in SIDES]

    def is_one_prompt(self):
        """Whether the template prints the prompt of both sides alike."""
        chosen, rejected = (self.row[name] for name in SIDES)
        return self.render(rejected) == self.render(chosen[:-1] + rejected[-1:])

    def render(self, messages, **options):
        options = {"tools": self.tools, **self.kwargs, **options}
        key = (self.theirs.chat_template, repr(messages), repr(options))
        if key not in self.memory:
            try:
                self.memory[key] = self.theirs.apply_chat_template(
                    copy.deepcopy(messages), tokenize=False, **options
                )
            except Exception:
                self.memory[key] = None
        if self.memory[key] is None:
            raise Refused
        return self.memory[key]

    def texts(self):
        """The prompt with what begins an answer, and both whole conversations."""
        alone = self.render(self.prompt, add_generation_prompt=True)
        return [alone, *(self.render(self.prompt + side) for side in self.sides)]

    def ids(self):
        """TRL's: prompt, chosen, rejected; the completions begin where the encodings part."""

        def encode(text):
            return self.theirs(text, add_special_tokens=False)["input_ids"]

        alone, *whole = map(encode, self.texts())
        cut = min(common_prefix_length(alone, side) for side in whole)
        return [alone[:cut], *(side[cut:] for side in whole)]

    def missing(self):
        """What the template leaves out of the row's two conversations."""
        return set().union(
            *(missing(self, self.prompt + side, len(self.prompt)) for side in self.sides)
        )

    def in_parts(self):
        """The row with every text as a list of one part, as processors of pictures make it."""
        row = copy.deepcopy(self.row)
        for message in (m for name in ("prompt", *SIDES) for m in row.get(name, [])):
            if isinstance(message["content"], str):
                message["content"] = parts(message["content"])
        return Row(self.theirs, row, self.memory)

    def joined(self):
        """The row with every list of text as one text; None if there is none."""
        row = copy.deepcopy(self.row)
        found = False
        for message in (m for name in ("prompt", *SIDES) for m in row.get(name, [])):
            content = message["content"]
            if isinstance(content, list) and all(part["type"] == "text" for part in content):
                message["content"] = "".join(part["text"] for part in content)
                found = True
        return Row(self.theirs, row, self.memory) if found else None


def letters(text):
    """What no template changes but for the case: letters and digits."""
    return "".join(filter(str.isalnum, text)).lower()


def has(render, text):
    spelt = [text, *(json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (False, True))]
    return any(
        one.strip() in render or (letters(one) and letters(one) in letters(render)) for one in spelt
    )


def between_words(text, i, is_answer):
    """A text with a word before it, but behind its thoughts, and a word at its end."""
    thought, end, said = text.rpartition("</think>") if is_answer else ("", "", text)
    return f"{thought}{end}begin{i}q {said} end{i}q"


def missing(row, messages, answer):
    """Places in ``messages`` whose text the render lacks, as ``(message, what)``; ``answer`` is the first of the answer."""
    render = row.render(messages)
    marked = copy.deepcopy(messages)
    names = copy.deepcopy(messages)
    texts = []  # message, text, number
    for i, message in enumerate(marked):
        is_answer = message["role"] == "assistant"

        def mark(text, i=i, is_answer=is_answer):
            if not isinstance(text, str):
                return text
            said = text.rpartition("</think>")[2] if is_answer else text
            if not said.strip():
                return text
            texts.append((i, text, len(texts)))
            return between_words(text, len(texts) - 1, is_answer)

        content = message["content"]
        if isinstance(content, list):
            for part in content:
                part["text"] = mark(part.get("text"))
        elif isinstance(content, dict):
            message["content"] = {key: mark(value) for key, value in content.items()}
        else:
            message["content"] = mark(content)
        for one in names[i].get("tool_calls") or []:
            said, word = one["function"], f"call{i}q"
            said["name"] += word
            if isinstance(said["arguments"], str):
                said["arguments"] += word
            elif said["arguments"]:
                said["arguments"] = {
                    key: value + word if isinstance(value, str) else value
                    for key, value in said["arguments"].items()
                }
    out = set()
    try:
        words = row.render(marked).lower()
    except Refused:
        words = None
    for i, text, number in texts:
        said = re.sub(r"/(no_?)?think", "", text.rpartition("</think>")[2])
        is_there = has(render, text) or (
            messages[i]["role"] in ("assistant", "system") and has(render, said)
        )
        if words is not None:
            is_there &= f"begin{number}q" in words and f"end{number}q" in words
        if not is_there:
            out.add((i, "text"))
    try:
        words = row.render(names).lower()
    except Refused:
        words = render.lower()
    for i, message in enumerate(messages):
        content = message["content"]
        if isinstance(content, list | dict) and (
            repr(content) in render
            or any(repr(part) in render for part in content if isinstance(part, dict))
        ):
            out.add((i, "as Python prints it"))
        calls = message.get("tool_calls")
        word = f"call{i}q"
        if calls and words.count(word) < json.dumps(names[i]["tool_calls"]).count(word):
            is_all = content in (None, "", parts(""))
            out.add((i, "the only call" if i >= answer and is_all else "call"))
    return out


def reads(template, name):
    return re.search(rf"\b{name}\b", re.sub(r"{#.*?#}", "", template, flags=re.S)) is not None


def ours(tokenizer, row, boundary):
    """The ids and warnings of a row, or the error."""
    try:
        pairs = PairDataset.from_rows(
            [row], tokenizer, boundary=boundary, max_length=None, threads=1
        )
    except (DataError, ValueError) as error:
        return error
    pair = pairs[0]
    return [list(pair[f"{name}_ids"]) for name in ("prompt", *SIDES)], dict(pairs.report.warned)


def is_ids(got, want):
    """Whether ids in both boundaries are these; "joint" may part elsewhere, but says the same."""
    (trl, _), (joint, _) = got
    return trl == want and all(joint[0] + joint[k] == want[0] + want[k] for k in (1, 2))


def outcome(template, kind, theirs, tokenizer, memory):
    """What came of a row, in a word; `other: ...` is a fault."""
    row = Row(theirs, KINDS[kind], memory)
    got = [ours(tokenizer, row.row, boundary) for boundary in ("trl", "joint")]
    if any(template == TEMPLATES.get(name) for name in OF_PARTS):
        row = row.in_parts()
    errors = [one for one in got if isinstance(one, Exception)]
    if len(errors) == 1:
        return f"other: refused by one boundary alone: {errors[0]}"
    try:
        want = row.ids()
        lost = row.missing()
    except Refused:
        want, lost = None, None
    better = row.joined()
    try:
        better_ids = (
            better.ids()
            if better and (want is None or hard(lost)) and not hard(better.missing())
            else None
        )
    except Refused:
        better_ids = None
    if errors:
        return refusal(template, row, errors[0], want, lost, better_ids)
    if want is not None and is_ids(got, want) and not hard(lost):
        warned = got[0][1]
        if any(what == "call" for _, what in lost) and "tool_calls_dropped" not in warned:
            return f"other: a call went missing without a word: {lost}"
        return "equal"
    if better_ids is not None and is_ids(got, better_ids):
        return "joined"
    if want is None:
        return "other: transformers refuses it"
    if not is_ids(got, want):
        return "other: other ids"
    return f"other: went missing in silence: {lost}"


def hard(lost):
    """What of it makes a row bad."""
    return {place for place in lost if place[1] != "call"}


def refusal(template, row, error, want, lost, better):
    reason = getattr(error, "reason", type(error).__name__)
    if better is not None:
        return f"other: refused, but right when joined: {error}"
    if any(
        isinstance(m["content"], list) and any(p["type"] == "image" for p in m["content"])
        for m in row.prompt
    ):
        return "picture" if reason == "images" else f"other: {error}"
    if row.kwargs and not any(reads(template, name) for name in row.kwargs):
        return "option" if reason == "bad_messages" else f"other: {error}"
    if want is None:
        return "both refuse"
    if reason == "different_prompts" and "prompt" not in row.row and not row.is_one_prompt():
        return "different prompts"
    if reason == "content_dropped" and hard(lost):
        return "missing"
    if reason == "identical_pair" and want[1] == want[2]:
        return "same on both sides"
    return f"other: refused: {error}"


@pytest.mark.skipif(not as_ours(), reason="transformers 4 shows messages to templates otherwise")
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_kind_of_row_has_transformers_ids_or_a_true_reason(live, name):
    template = TEMPLATES[name]
    theirs, tokenizer = live(template)
    memory = {}
    outcomes = {kind: outcome(template, kind, theirs, tokenizer, memory) for kind in KINDS}
    assert {kind: what for kind, what in outcomes.items() if what.startswith("other")} == {}
    count = sum(what in ("equal", "joined") for what in outcomes.values())
    assert count >= (0 if name in LOSING else 12), outcomes


def test_the_matrix_is_large_enough():
    assert len(KINDS) >= 22
    assert len(TEMPLATES) >= (120 if of_trl() else 85)


# ---- templates that leave something out, each found ------------------------------------------------

TURN = "[{{ m.role }}]{{ m.content or '' }}{% for c in m.tool_calls or [] %}<{{ c.function.name }} {{ c.function.arguments | tojson }}>{% endfor %}"
START = "{% if add_generation_prompt %}[assistant]{% endif %}"


def turns(turn=TURN, condition=""):
    return "{% for m in messages " + condition + " %}" + turn + "\n{% endfor %}" + START


PLANTED = {
    "the last word": (turns("[{{ m.role }}]{{ m.content.split(' ')[:-1] | join(' ') }}"), "plain"),
    "the first word": (turns("[{{ m.role }}]{{ m.content.split(' ')[1:] | join(' ') }}"), "plain"),
    "a word in the middle": (turns("[{{ m.role }}]{{ m.content | replace('weather ', '') }}"), "plain"),
    "the last letter": (turns("[{{ m.role }}]{{ m.content[:-1] }}"), "short"),
    "a middle turn": (turns("{% if loop.index0 != 1 %}" + TURN + "{% endif %}"), "multi-turn"),
    "a short turn": (turns("{% if loop.index0 != 1 %}" + TURN + "{% endif %}"), "short"),
    "a short turn whose text stands elsewhere": (turns("{% if m.role != 'observer' %}" + TURN + "{% endif %}"), "short, and dropped by some"),
    "the first of two like turns": (turns("{% if not loop.first %}" + TURN + "{% endif %}"), "a turn twice"),
    "the second of two like turns": (turns("{% if loop.index0 != 2 %}" + TURN + "{% endif %}"), "a turn twice"),
    "an answer like an earlier one": (turns("{% if loop.index0 != 3 %}" + TURN + "{% endif %}"), "a turn twice"),
    "a turn that another one quotes": (turns("{% if not loop.first %}" + TURN + "{% endif %}"), "an answer that quotes"),
    "a system turn that the user repeats": (turns(condition="if m.role != 'system'"), "a system turn that some have by default"),
    "all but the last turns": ("{% for m in messages[-2:] %}" + TURN + "{% endfor %}" + START, "multi-turn"),
    "a tool's answer": (turns(condition="if m.role != 'tool'"), "call"),
    "a tool's answer that is an object": (turns("[{{ m.role }}]{% if m.content is not mapping %}{{ m.content }}{% endif %}"), "a tool answers an object"),
    "a field of a tool's answer": (turns("[{{ m.role }}]{{ m.content.degrees if m.content is mapping else m.content }}"), "a tool answers an object"),
    "the calls of an answer": (turns("[{{ m.role }}]{{ m.content }}"), "an answer is a call"),
    "the arguments of an answer's call": (turns("[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"), "an answer is a call"),
    "all parts but the first": (turns("[{{ m.role }}]{{ m.content if m.content is string else m.content[0].text }}"), "an object of parts"),
    "what a user says before a thought ends": (turns("[{{ m.role }}]{{ m.content.split('</think>')[-1] }}"), "nasty"),
    "an answer that is all thought": (turns("[{{ m.role }}]{{ m.content.split('</think>')[-1] }}"), "an answer is a thought"),
}  # fmt: skip
MORE_KINDS = {
    "an object of parts": row(say("user", [*parts("is it the sun?"), {"type": "note", "content": "he looks up"}])),
    "an answer is a thought": row(chosen="<think>they ask about Bern</think>"),
}  # fmt: skip


@pytest.mark.parametrize("boundary", ["trl", "joint"])
@pytest.mark.parametrize("name", PLANTED)
def test_what_a_template_leaves_out_is_never_trained_on(live, name, boundary):
    template, kind = PLANTED[name]
    _, tokenizer = live(template)
    error = ours(tokenizer, (KINDS | MORE_KINDS)[kind], boundary)
    assert getattr(error, "reason", error) == "content_dropped"


@pytest.mark.parametrize("name", PLANTED)
def test_templates_that_leave_nothing_out_are_not_refused(live, name):
    """The control: the same rows through a template that prints everything as JSON."""
    _, tokenizer = live("{% for m in messages %}{{ m | tojson }}\n{% endfor %}" + START)
    got = ours(tokenizer, (KINDS | MORE_KINDS)[PLANTED[name][1]], "joint")
    assert not isinstance(got, Exception), got


COUNTED = {
    "a call beside text": (turns("[{{ m.role }}]{{ m.content }}"), "call with text", "tool_calls_dropped"),
    "the second call": (turns("[{{ m.role }}]{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0] | tojson }}{% endif %}"), "calls", "tool_calls_dropped"),
    "a call whose name stands in the tools": ("{{ tools | tojson }}" + turns("[{{ m.role }}]{{ m.content }}"), "tools and a call", "tool_calls_dropped"),
    "tools whose name stands in a call": (turns(), "tools and a call", "tools_dropped"),
    "thoughts in an answer": (turns("[{{ m.role }}]{{ m.content.split('</think>')[-1] }}"), "thoughts in an answer", "reasoning_dropped"),
    "the reasoning of an answer": (turns(), "reasoning of an answer", "reasoning_dropped"),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_what_may_be_left_out_is_counted(live, name):
    template, kind, warning = COUNTED[name]
    _, tokenizer = live(template)
    _, warned = ours(tokenizer, KINDS[kind], "joint")
    assert warned == {warning: 1}


@pytest.mark.parametrize(
    "kind", ["thoughts in an earlier answer", "reasoning of an earlier answer"]
)
def test_thoughts_of_the_past_are_not_counted(live, kind):
    _, tokenizer = live(ROW_SHAPES["thoughts_of_the_past_go"])
    _, warned = ours(tokenizer, KINDS[kind], "joint")
    assert warned == {}
