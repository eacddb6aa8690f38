"""Chat templates: byte for byte transformers', and bounded."""

import random

import pytest
import warm
from byte_tokenizer import TEMPLATE, tokenizer
from template_shapes import as_ours

from dpo_ext import DataError, LimitExceeded, Tokenizer, TokenizerError

CHATML = (
    "{%- if tools %}\n"
    "    {{- '<|im_start|>system\\n' }}\n"
    "    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}\n"
    "    {{- '# Tools\\n<tools>' }}\n"
    "    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}\n"
    "    {{- '\\n</tools><|im_end|>\\n' }}\n"
    "{%- elif messages[0].role == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}\n"
    "{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {%- if message.role != 'system' or not loop.first %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}\n"
    "    {%- for call in message.tool_calls or [] %}\n"
    "    {{- '\\n<tool_call>\\n' + (call | tojson) + '\\n</tool_call>' }}\n"
    "    {%- endfor %}\n"
    "    {{- '<|im_end|>\\n' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}\n"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if loop.index0 == 0 and system_message %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
THINKING = (
    "{%- set ns = namespace(last=-1) %}\n"
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}\n"
    "{%- endfor %}\n"
    "{%- for message in messages %}\n"
    "    {%- set content = message.content %}\n"
    "    {%- set thought = '' %}\n"
    "    {%- if message.reasoning_content is string %}\n"
    "        {%- set thought = message.reasoning_content %}\n"
    "    {%- elif '</think>' in content %}\n"
    "        {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}\n"
    "        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n"
    "    {%- endif %}\n"
    "    {{- '<|' ~ message.role ~ '|>' }}\n"
    "    {%- if thought and loop.index0 > ns.last %}{{- '<think>\\n' + thought + '\\n</think>\\n' }}{%- endif %}\n"
    "    {{- content + '<|end|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think></think>' }}{%- endif %}"
    "{%- endif %}"
)
PARTS = (
    "{% for m in messages %}{{ m.role | upper }}: "
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}\n{% endfor %}"
)
GENERATION = (
    "{% for message in messages %}{% if message.role == 'assistant' %}A: {% generation %}"
    "{{ message.content }}{{ eos_token }}{% endgeneration %}{% else %}U: {{ message.content }}"
    "{% endif %}\n{% endfor %}{%- generation -%}x{%- endgeneration %}"
)
MACRO = (
    "{% macro turn(role, text) -%}[{{ role | title }}] {{ text | trim }}{%- endmacro %}"
    "{% for m in messages %}{% if m.content is none %}{% continue %}{% endif %}"
    "{{ turn(m['role'], m['content']) }}{{ '\\n' if not loop.last }}"
    "{% if loop.index > 5 %}{% break %}{% endif %}{% endfor %}"
)
PRINTING = (
    "{% for m in messages %}{{ m }}|{{ m.items() | list }}|{{ m | tojson(indent=2) }}|"
    "{{ m | tojson(sort_keys=true, ensure_ascii=true, separators=(',', ':')) }}{% endfor %}"
    "{{ 1e20 | tojson }}{{ 0.1 | tojson }}{{ [1.0, 2, none, true] | tojson }}"
    "{{ '<a href=\"x\">&' | tojson }}"
)
METHODS = (
    "{% for m in messages %}{% set c = m.content %}{{ c.removeprefix('he') }}|{{ c.removesuffix('x') }}"
    "|{{ c.partition(' ')[0] }}|{{ c.rpartition(' ')[2] }}|{{ c.rsplit(' ', 1)[-1] }}|{{ c.upper() }}"
    "|{{ c.startswith('h') }}|{{ c.endswith('x') }}|{{ c.strip() }}|{{ c.replace('a', 'b') }}|{{ c | length }}"
    "|{{ c[:3] }}|{{ c[-2:] }}|{{ c.find('e') }}|{{ c.split() | join('+') }}|{{ m.get('no', 'd') }}"
    "|{{ 'content' in m }}|{{ m.keys() | list | join(',') }}{% endfor %}"
)
TESTS = (
    "{{ tools is iterable }}{{ tools is none }}{{ messages is sequence }}{{ 'a' is sequence }}"
    "{{ {'a': 1} is sequence }}{{ 'a' is iterable }}{{ messages[0] is mapping }}{{ 3 is number }}"
    "{{ missing is defined }}{{ missing }}{{ messages | length }}{{ (messages | last).role }}"
    "{% for m in messages | selectattr('role', 'equalto', 'user') %}{{ m.content }}{% endfor %}"
    "{{ messages | map(attribute='role') | unique | join('/') }}{{ bos_token is defined }}"
    "{% if tools is iterable and tools | length > 0 %}T{% endif %}"
)
TEMPLATES = {
    name: text
    for name, text in globals().items()
    if name.isupper() and isinstance(text, str) and "{" in text
}
WORDS = [
    "hello",
    "x",
    "Zürich",
    "東京",
    "  ",
    "\n\n",
    "<think>a</think>b",
    "\"'",
    "&<>",
    "1.5",
    "a",
]


def conversations():
    """50 conversations: roles, tools, odd white space, no content beside a tool call."""
    rng = random.Random(0)
    out = []
    for i in range(50):
        messages = []
        if rng.random() < 0.3:
            messages.append({"role": "system", "content": rng.choice(WORDS)})
        for k in range(rng.randint(1, 5)):
            role = ("user", "assistant")[k % 2]
            text = " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))
            messages.append({"role": role, "content": text})
            if role == "assistant" and rng.random() < 0.3:
                call = {"name": "f", "arguments": {"a": [1, 2.5, None, True], "ü": "<é>"}}
                messages[-1]["tool_calls"] = [{"type": "function", "function": call}]
            if role == "assistant" and rng.random() < 0.2:
                messages[-1]["reasoning"] = "because"
        options = {"add_generation_prompt": bool(i % 2)}
        if i % 3 == 0:
            schema = {"type": "object", "properties": {"a": {"type": "number", "default": 1e20}}}
            options["tools"] = [
                {"type": "function", "function": {"name": "f", "parameters": schema}}
            ]
        if i % 5 == 0:
            options["enable_thinking"] = False
        out.append((messages, options))
    return out


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_are_transformers_bytes(live, name):
    import jinja2

    theirs, ours = live(TEMPLATES[name])
    rendered = 0
    for messages, options in conversations():
        if not as_ours():
            messages = [{k: v for k, v in m.items() if k != "reasoning"} for m in messages]
        try:
            want = theirs.apply_chat_template(messages, tokenize=False, **options)
        except (jinja2.TemplateError, TypeError):
            with pytest.raises(TokenizerError):
                ours.apply_chat_template(messages, **options)
            continue
        assert ours.apply_chat_template(messages, **options) == want
        rendered += 1
    assert rendered > 10


def test_qwens_own_template_renders_transformers_bytes(shared_dir):
    transformers = pytest.importorskip("transformers")
    folder = shared_dir / "tokenizers" / "qwen2.5"
    theirs, ours = (
        transformers.AutoTokenizer.from_pretrained(folder),
        Tokenizer.from_pretrained(folder),
    )
    for messages, options in conversations():
        assert ours.apply_chat_template(messages, **options) == theirs.apply_chat_template(
            messages, tokenize=False, **options
        )


def test_strftime_now_is_pythons(tmp_path):
    from datetime import datetime

    formats = "%d %B %Y|%b %d, %Y|%A %a %j %y %p %I|%-d/%-m %F %%"
    template = "{{ strftime_now('" + formats + "') }}"
    before = datetime.now().strftime(formats)
    got = tokenizer(tmp_path / "m", template=template).apply_chat_template([])
    assert got in (before, datetime.now().strftime(formats))


ATTACKS = {
    "long loop": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "range of 10^9": "{% for i in range(1000000000) %}{% endfor %}",
    "string doubling": "{% set ns = namespace(s='aaaaaaaaaaaaaaaa') %}"
    "{% for i in range(1000) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "string product": "{{ 'a' * 1000000000 }}",
    "list product": "{{ [1] * 1000000000 }}",
    "join": "{% set s = 'a' * 1000 %}{% for i in range(10000) %}{{ s * 1000 }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "deep list": "{% set ns = namespace(x=[]) %}{% for i in range(20000) %}"
    "{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    "replace": "{% set ns = namespace(s='ab') %}{% for i in range(60) %}"
    "{% set ns.s = ns.s.replace('a', 'aab').replace('b', 'bba') %}{% endfor %}{{ ns.s }}",
    "attributes": "{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}",
    "center": "{{ 'a'.center(10000000000) }}",
    "format": "{{ '%0999999999d' | format(1) }}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_ends_at_once_and_small(tmp_path, name):
    """In a child with 2 GiB of address space; a template may also render harmless text."""
    import time

    tokenizer(tmp_path / "m", template=ATTACKS[name])
    code = (
        "import resource, sys, dpo_ext\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "t = dpo_ext.Tokenizer.from_pretrained(sys.argv[1])\n"
        "try:\n"
        "    out = t.apply_chat_template([{'role': 'user', 'content': 'x'}])\n"
        "    print('rendered', len(out))\n"
        "except (dpo_ext.TokenizerError, dpo_ext.LimitExceeded) as e:\n"
        "    print('refused')\n"
    )
    start = time.monotonic()
    done = warm.run(code, tmp_path / "m", imports=warm.NUMPY, timeout=60)
    assert done.returncode == 0, done.stderr[-500:]
    if name == "attributes":
        assert done.stdout.split()[0] in ("refused", "rendered")
    else:
        assert done.stdout == "refused\n"
    assert time.monotonic() - start < 20


def test_a_template_that_does_not_compile_names_its_line(tmp_path):
    ours = tokenizer(tmp_path / "m", template="a\n{% for x in %}")
    with pytest.raises(TokenizerError, match=r"chat template does not compile.*line 2"):
        ours.apply_chat_template([])


def test_no_template_is_an_error_that_says_what_to_do(tmp_path):
    ours = tokenizer(tmp_path / "m", template=None)
    with pytest.raises(TokenizerError, match="has no chat template\nhint: give `chat_template=`"):
        ours.apply_chat_template([{"role": "user", "content": "x"}])


def test_output_over_the_cap_names_the_limit(tmp_path):
    ours = tokenizer(tmp_path / "m", template=TEMPLATE)
    with pytest.raises(LimitExceeded) as caught:
        ours.apply_chat_template([{"role": "user", "content": "x" * (17 << 20)}])
    assert caught.value.field == "max_rendered_bytes"


def test_a_lone_surrogate_is_a_data_error(tmp_path):
    ours = tokenizer(tmp_path / "m")
    with pytest.raises(DataError, match="lone surrogate"):
        ours.apply_chat_template([{"role": "user", "content": "\ud800"}])
