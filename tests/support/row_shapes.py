"""Chat templates that treat parts, tools, thoughts and roles of a row each in another way; their texts are our own.

`ROW_SHAPES` maps a name to a template, as `template_shapes.SHAPES` does.
"""

_START = "{% if add_generation_prompt %}[assistant]{% endif %}"
_CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}"

ROW_SHAPES = {}

# ---- parts ----------------------------------------------------------------------------------------

ROW_SHAPES["parts_only"] = (
    "{% for m in messages %}{{ m.role | capitalize }}{{ ':' if m.content[0].type == 'image' else ': ' }}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% elif p.type == 'image' %}{{ '<image>' }}{% endif %}"
    "{% endfor %}<end>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
ROW_SHAPES["parts_selected"] = (
    "{% for m in messages %}[{{ m.role }}]{% for p in m.content | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
    "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}\n{% endfor %}"
    + _START
)
ROW_SHAPES["first_part_only"] = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content if m.content is string else m.content[0].text }}\n{% endfor %}"
    + _START
)
ROW_SHAPES["parts_on_lines"] = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{{ m.content | map(attribute='text') | join('\\n') }}{% endif %}\n{% endfor %}" + _START
)
ROW_SHAPES["parts_trimmed"] = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content | trim }}{% else %}"
    "{% for p in m.content %}{{ p.text | trim + ' ' }}{% endfor %}{% endif %}\n{% endfor %}"
    + _START
)
ROW_SHAPES["parts_of_users_only"] = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'user' and m.content is not string %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    + _START
)
ROW_SHAPES["lists_are_nothing"] = (
    "{% for m in messages %}{% set c = m.content if m.content is string else '' %}[{{ m.role }}]{{ c }}\n{% endfor %}"
    + _START
)
ROW_SHAPES["lists_as_json"] = (
    "{% for m in messages %}{% set c = m.content %}{% if c is not string %}{% set c = c | tojson %}{% endif %}"
    "{{ '[' + m.role + ']' + c + '\\n' }}{% endfor %}" + _START
)
ROW_SHAPES["lists_as_python"] = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}" + _START
)
ROW_SHAPES["each_part_as_python"] = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p }}{% endfor %}{% endif %}\n{% endfor %}" + _START
)

# ---- tools ----------------------------------------------------------------------------------------

ROW_SHAPES["answers_by_id"] = (
    "{% for m in messages %}{% if m.role != 'tool' %}[{{ m.role }}]{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call {{ c.function.name }}{{ c.function.arguments | tojson }}>"
    "{% for t in messages if t.role == 'tool' and t.tool_call_id == c.id %}<answer {{ c.function.name }}: {{ t.content }}>"
    "{% endfor %}{% endfor %}\n{% endif %}{% endfor %}" + _START
)
ROW_SHAPES["answers_by_name"] = (
    "{% for m in messages %}{% if m.role == 'tool' %}{% if m.name is not defined %}"
    "{{ raise_exception('a tool has a name') }}{% endif %}<answer {{ m.name }}>{{ m.content }}</answer>{% else %}"
    "[{{ m.role }}]{{ m.content or '' }}" + _CALLS + "{% endif %}\n{% endfor %}" + _START
)
ROW_SHAPES["tool_turns_with_tools_only"] = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}"
    "{% if m.role in ('system', 'user', 'assistant') or tools %}[{{ m.role }}]{{ m.content or '' }}"
    "{% if tools %}" + _CALLS + "{% endif %}\n{% endif %}{% endfor %}" + _START
)
ROW_SHAPES["mistral_calls"] = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and loop.revindex0 <= 1 %}{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST]' + m.content + '[/INST]' }}{% elif m.tool_calls %}{{ m.content or '' }}"
    "{% for c in m.tool_calls %}{{ '[TOOL_CALLS]' + c.function.name + '[ARGS]' + (c.function.arguments | tojson if "
    "c.function.arguments is not string else c.function.arguments) }}{% endfor %}{{ eos_token }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content | string + '[/TOOL_RESULTS]' }}"
    "{% elif m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
    "{% else %}{{ raise_exception('an unknown role: ' + m.role) }}{% endif %}{% endfor %}"
)
ROW_SHAPES["ipython"] = (
    "{{ bos_token }}{% for m in messages %}{% if m.role in ('tool', 'ipython') %}<ipython>"
    "{% if m.content is mapping or m.content is iterable %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}"
    "{% elif 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    '<assistant>{{ \'{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{ m.tool_calls[0].function.arguments | tojson }}{{ '}' }}{% else %}<{{ m.role }}>{{ m.content | trim }}{% endif %}<eot>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROW_SHAPES["pythonic_calls"] = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}({% if c.function.arguments is mapping %}{% for k, v in c.function.arguments.items() %}"
    "{{ k }}={{ v | tojson }}{{ ', ' if not loop.last }}{% endfor %}{% endif %}){% endfor %}\n{% endfor %}"
    + _START
)
ROW_SHAPES["xml_calls"] = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "<function={{ c.function.name }}>{% for k, v in (c.function.arguments or {}) | items %}<parameter={{ k }}>{{ v }}"
    "</parameter>{% endfor %}</function>{% endfor %}\n{% endfor %}" + _START
)
ROW_SHAPES["first_call_only"] = (
    "{% for m in messages %}[{{ m.role }}]{% if m.tool_calls %}to={{ m.tool_calls[0].function.name }} "
    "{{ m.tool_calls[0].function.arguments | tojson }}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    + _START
)
ROW_SHAPES["answers_of_objects"] = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'tool' and m.content is mapping %}"
    "{% for k, v in m.content | dictsort %}{{ k }}: {{ v }}; {% endfor %}{% elif m.role == 'tool' and m.content is not string %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% else %}{{ m.content or '' }}{% endif %}"
    + _CALLS
    + "\n{% endfor %}"
    + _START
)

# ---- thoughts -------------------------------------------------------------------------------------

ROW_SHAPES["channels"] = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking and (loop.last or m.tool_calls) %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}<|start|>assistant to=functions.{{ c.function.name }}<|channel|>commentary"
    "<|message|>{{ c.function.arguments | tojson }}<|call|>{% endfor %}{% else %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}"
    "{% elif m.role == 'tool' %}<|start|>functions<|message|>{{ m.content | tojson }}<|end|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
ROW_SHAPES["thoughts_of_the_past_go"] = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}[{{ m.role }}]{% set c = m.content or '' %}"
    "{% if m.role == 'assistant' and '</think>' in c and loop.index0 < ns.last %}{{ c.split('</think>')[-1].lstrip('\\n') }}"
    "{% else %}{{ c }}{% endif %}\n{% endfor %}" + _START
)
ROW_SHAPES["thoughts_always_go"] = (
    "{% for m in messages %}[{{ m.role }}]{% set c = m.content or '' %}"
    "{{ c.split('</think>')[-1].strip() if m.role == 'assistant' else c }}\n{% endfor %}" + _START
)
ROW_SHAPES["thoughts_move"] = (
    "{% for m in messages %}[{{ m.role }}]{% set c = m.content or '' %}{% set t = m.reasoning_content or '' %}"
    "{% if m.role == 'assistant' and not t and '</think>' in c %}{% set t = c.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set c = c.split('</think>')[-1].strip() %}{% endif %}"
    "{% if m.role == 'assistant' %}<think>\n{{ t }}\n</think>\n\n{% endif %}{{ c }}\n{% endfor %}"
    + _START
)
ROW_SHAPES["enable_thinking_speaks"] = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'user' and enable_thinking is defined and not "
    "enable_thinking %}/nothink{% endif %}\n{% endfor %}{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
ROW_SHAPES["a_default_of_its_own"] = (
    "{% set enable_thinking = enable_thinking if enable_thinking is defined else true %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{{ '<think>' if enable_thinking else '<think></think>' }}{% endif %}"
)
ROW_SHAPES["flags_in_the_system_turn"] = (
    "{% set ns = namespace(think=true, system='You are small.') %}{% if messages[0].role == 'system' %}"
    "{% if '/no_think' in messages[0].content %}{% set ns.think = false %}{% endif %}"
    "{% set ns.system = messages[0].content.replace('/no_think', '').replace('/think', '').rstrip() %}{% endif %}"
    "[system]{{ ns.system }}\n{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}]{{ m.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{{ '<think></think>' if not ns.think }}{% endif %}"
)

# ---- roles ----------------------------------------------------------------------------------------

ROW_SHAPES["no_system"] = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}\n{% endfor %}" + _START
)
ROW_SHAPES["known_roles_or_nothing"] = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}[{{ m.role }}]{{ m.content }}\n{% endif %}{% endfor %}"
    + _START
)
ROW_SHAPES["developer_is_system"] = (
    "{% for m in messages %}[{{ 'system' if m.role == 'developer' else m.role }}]{{ m.content }}\n{% endfor %}"
    + _START
)
ROW_SHAPES["system_in_the_last_user_turn"] = (
    "{% set s = messages[0].content if messages[0].role == 'system' else none %}{% for m in messages %}"
    "{% if m.role != 'system' %}[{{ m.role }}]{% if s and m.role == 'user' and loop.revindex <= 2 %}{{ s + '\\n\\n' }}"
    "{% endif %}{{ m.content }}\n{% endif %}{% endfor %}" + _START
)
ROW_SHAPES["default_system"] = (
    "{% if messages[0].role != 'system' %}[system]You are a careful helper.\n{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}" + _START
)
ROW_SHAPES["shouting"] = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content | upper }}\n{% endfor %}" + _START
)
ROW_SHAPES["quoted"] = (
    "{% for m in messages %}{{ {'role': m.role, 'content': m.content} | tojson }}\n{% endfor %}"
    + _START
)
ROW_SHAPES["documents"] = (
    "{% for d in documents or [] %}{{ d.title }}: {{ d.text }}\n{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}" + _START
)
ROW_SHAPES["loss_marks"] = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}\n{% endfor %}" + _START
)
