"""Which chat templates a tokenizer has, and transformers' renderer for what Rust's lacks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from dpo_ext.errors import TokenizerError
from dpo_ext.extras import need

TOOL_USE = "tool_use"
# The variable in which Rust tells a renderer the time of the data set.
HIDDEN_CLOCK = "_dpo_ext_now"
# In place of transformers' own, which reads the machine's clock; what it is given as a variable
# becomes plain data. The line end is taken away with the tag before it.
CLOCK = (
    "{%- macro strftime_now(format) -%}"
    "{%- if format in _dpo_ext_now -%}{{ _dpo_ext_now[format] }}"
    "{%- else -%}{{ raise_exception('`strftime_now`: a format that is spelt nowhere') }}"
    "{%- endif -%}{%- endmacro %}\n"
)
_STRINGS = re.compile(r"""'([^'\\\n]*%[^'\\\n]*)'|"([^"\\\n]*%[^"\\\n]*)\"""")


class Fallback:
    """Renders with transformers' jinja2 what minijinja cannot; Rust calls it, from any thread.

    Called with a template, its variables as JSON and what was lacking; gives the text, or None if
    transformers is not installed, or raises what the template raises. It has jinja2's sandbox, but
    none of our limits on time and size.

    Attributes:
        construct: what was lacking at the first call, None before.
    """

    def __init__(self) -> None:
        self.construct: str | None = None

    def __call__(self, template: str, variables: str, construct: str) -> str | None:
        try:
            found = need("transformers.utils.chat_template_utils", "this chat template")
        except ImportError:
            return None
        named = json.loads(variables)
        messages = named.pop("messages")
        moment = datetime(*named.pop(HIDDEN_CLOCK))
        if "strftime_now" in template:
            named[HIDDEN_CLOCK] = _dates(template, moment)
            template = CLOCK + template
        answer: Any = found.render_jinja_template(
            conversations=[messages], chat_template=template, **named
        )
        if self.construct is None:
            self.construct = " ".join(construct.split())
        return answer[0][0]

    @property
    def note(self) -> str | None:
        """What a reader should know, None if it was never needed."""
        if self.construct is None:
            return None
        return (
            "the chat template is rendered by transformers where minijinja cannot, many times "
            f"slower and without limits: {self.construct}"
        )


def _dates(template: str, moment: datetime) -> dict[str, str]:
    """What a moment is by every string of a template that may be a format."""
    formats = {single or double for single, double in _STRINGS.findall(template)}
    return {text: moment.strftime(text) for text in formats}


def choose(templates: Any, name: str | None) -> tuple[str | None, str | None]:
    """The template of conversations without tools and that of conversations with tools.

    Same as ``transformers``' choice: of several named templates ``tool_use`` serves conversations
    with tools and ``default`` the others; ``name`` is one of them, or the text of a template, and
    serves all.

    Args:
        templates: text, a dict of texts by name, the list of ``{name, template}`` that
            tokenizer_config.json holds, or None.
        name: the caller's ``chat_template=``.

    Returns:
        Two texts; the second is None where the first serves both.

    Raises:
        TokenizerError: not such a structure, or several templates and none of them ``default``.

    >>> choose({"default": "a", "tool_use": "b"}, None)
    ('a', 'b')
    >>> choose([{"name": "rag", "template": "c"}], "rag")
    ('c', None)
    """
    if isinstance(templates, list):
        if not all(isinstance(t, Mapping) and {"name", "template"} <= set(t) for t in templates):
            raise TokenizerError("`chat_template`: expected a list of objects with name, template")
        templates = {entry["name"]: entry["template"] for entry in templates}
    if templates is not None and not isinstance(templates, str | Mapping):
        found = type(templates).__name__
        raise TokenizerError(f"`chat_template`: expected text, found {found}")
    if isinstance(templates, Mapping):
        for key, text in templates.items():
            if not isinstance(text, str):
                found = type(text).__name__
                raise TokenizerError(f"`chat_template`, `{key}`: expected text, found {found}")
        if name is not None:
            return templates.get(name, name), None
        if not templates:
            return None, None
        if "default" not in templates and set(templates) != {TOOL_USE}:
            names = ", ".join(sorted(templates))
            raise TokenizerError(
                f"`chat_template`: expected one called default among several, found {names}\n"
                "hint: name one with `chat_template=`"
            )
        return templates.get("default"), templates.get(TOOL_USE)
    return (templates if name is None else name), None
