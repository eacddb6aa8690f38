"""Kinds of row of messages, as data sets hold them: `KINDS` maps a name to a row."""

from __future__ import annotations

import json

QUESTION = "what is the weather like in Bern today?"
CHOSEN = "it is sunny there, with some wind from the west"
REJECTED = "nobody here could ever tell you that"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks at the sky of a city.",
            "parameters": {**PARAMETERS, "required": ["city"]},
        },
    }
]


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def call(arguments, name="look_up", number="abcdefgh1"):
    function = {"name": name, "arguments": arguments}
    return {"type": "function", "id": number, "function": function}


def row(*prompt, chosen=CHOSEN, rejected=REJECTED, **columns):
    """A row with its prompt in a column; a side is text or a list of turns."""
    prompt = list(prompt) or [say("user", QUESTION)]
    sides = {
        name: side if isinstance(side, list) else [say("assistant", side)]
        for name, side in (("chosen", chosen), ("rejected", rejected))
    }
    return {"prompt": prompt, **sides, **columns}


def implicit(prompt, other=None):
    """A row whose prompt is what both sides begin with, on the rejected side written as ``other``."""
    return {
        "chosen": [*prompt, say("assistant", CHOSEN)],
        "rejected": [*(other or prompt), say("assistant", REJECTED)],
    }


def called(*calls, content="", answer="clear sky, 20 degrees, wind from the west", **columns):
    """A row with calls of a tool and what it answered in the prompt."""
    answers = [
        say("tool", answer, tool_call_id=one["id"], name=one["function"]["name"]) for one in calls
    ]
    asked = say("assistant", content, tool_calls=list(calls))
    return row(say("user", QUESTION), asked, *answers, **columns)


SKY = {"city": "Bern on the Aare"}
ROUNDS = [
    say("user", "tell me about the seas of the moon"),
    say("assistant", "they are plains of old lava, and dry"),
    say("user", QUESTION),
]
NASTY = 'say "it\'s" \\n {{ messages }}\n\ttab, Zürich, 東京 \u2028 🙂 </think> and <b>&amp;</b>'
KINDS = {
    "plain": row(),
    "system": row(say("system", "answer in one short sentence"), say("user", QUESTION)),
    "multi-turn": row(*ROUNDS),
    "multi-turn with system": row(say("system", "answer in one short sentence"), *ROUNDS),
    "empty system": row(say("system", ""), say("user", QUESTION)),
    "parts": row(say("user", parts(QUESTION))),
    "several parts": row(
        say("user", parts("look: ", "is it the sun?", " or not")),
        chosen=[say("assistant", parts("it is ", "the sun, and it shines"))],
    ),
    "all parts": row(
        say("user", parts(QUESTION)),
        chosen=[say("assistant", parts(CHOSEN))],
        rejected=[say("assistant", parts(REJECTED))],
    ),
    "short parts": row(say("user", parts("is", " it?")), chosen=[say("assistant", parts("user", "s"))], rejected="no"),
    "parts on one side": row(rejected=[say("assistant", parts("nobody could ", "tell you that"))]),
    "thoughts in an answer": row(
        chosen="<think>\nthey ask about Bern\n</think>\n\nit is sunny there",
        rejected="<think>\nI would rather not say\n</think>\n\nwho could know it",
    ),
    "thoughts in an earlier answer": row(
        say("user", "tell me about the seas of the moon"),
        say("assistant", "<think>\nseas of the moon?\n</think>\n\nthey are plains of old lava"),
        say("user", QUESTION),
    ),
    "reasoning of an answer": row(
        chosen=[say("assistant", CHOSEN, reasoning_content="they ask about Bern")],
        rejected=[say("assistant", REJECTED, reasoning_content="I would rather not say")],
    ),
    "reasoning of an earlier answer": row(
        ROUNDS[0], say("assistant", ROUNDS[1]["content"], reasoning_content="seas of the moon?"), ROUNDS[2]
    ),
    "call": called(call(SKY)),
    "call with text": called(call(SKY), content="let me look at the sky for you"),
    "arguments as text": called(call(json.dumps(SKY))),
    "arguments are null": called(call(None)),
    "content is null": called(call(SKY), content=None),
    "calls": called(call(SKY), call({"city": "Thun at the lake", "days": 3}, number="abcdefgh2")),
    "an answer is a call": row(
        chosen=[say("assistant", "", tool_calls=[call(SKY)])], tools=TOOLS
    ),
    "a tool answers an object": called(call(SKY), answer={"sky": "clear and blue all day", "degrees": 20.5}),
    "a tool answers parts": called(call(SKY), answer=parts("clear sky, 20 degrees")),
    "tools": row(tools=TOOLS),
    "tools and a call": called(call(SKY), tools=TOOLS),
    "tools as text": called(call(SKY), tools=json.dumps(TOOLS)),
    "developer": row(say("developer", "answer in one short sentence"), say("user", QUESTION)),
    "white space": row(
        say("user", f"  {QUESTION}\n\n"), chosen=f"\n {CHOSEN} \t\n", rejected=f"{REJECTED}\n"
    ),
    "short": row(say("user", "ok"), say("assistant", "?"), say("user", "7"), chosen="user", rejected="a"),
    "short, and dropped by some": row(say("observer", "s"), say("user", QUESTION), chosen="yes"),
    "thinking on": row(chat_template_kwargs={"enable_thinking": True}),
    "thinking off": row(chat_template_kwargs={"enable_thinking": False}),
    "unknown role": row(say("narrator", "a stranger comes along the road"), say("user", QUESTION)),
    "image": row(say("user", [{"type": "image"}, *parts(QUESTION)])),
    "a space behind a shared turn": implicit([say("user", QUESTION)], [say("user", QUESTION + " ")]),
    "keys turned round": implicit(
        [say("user", QUESTION, weight=1)], [{"weight": 1.0, "content": QUESTION, "role": "user"}]
    ),
    "nasty": row(say("user", NASTY), chosen=NASTY[::-1] + "!", rejected=NASTY.upper()),
    "nasty arguments": called(call({"city": NASTY, "of": [1, None, {"x": "é"}]}), answer=NASTY),
    "a turn twice": row(ROUNDS[0], ROUNDS[1], ROUNDS[0], chosen=ROUNDS[1]["content"]),
    "an answer that quotes": row(chosen=f"you ask {QUESTION!r}, and {CHOSEN}"),
    "a system turn that some have by default": row(
        say("system", "You are a careful helper."), say("user", "You are a careful helper. Are you?")
    ),
    "a flag in the system turn": row(say("system", "be kind to them all /no_think"), say("user", QUESTION)),
}  # fmt: skip
KINDS = {
    name: json.loads(json.dumps(one)) for name, one in KINDS.items()
}  # no turn stands in two places
