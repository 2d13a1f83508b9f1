"""A conversation with tools, and templates as published models have them."""

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [
    {"role": "system", "content": "You are terse. <b>&'\"</b>"},
    {"role": "user", "content": "  Wie heißt der heiße Wind? 🌬️ \n"},
    {"role": "assistant", "content": "Zonda."},
    {"role": "user", "content": "{{ 7 * 7 }} {% raise %}"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "wind",
            "description": "Speed of the wind at a place, in m/s; <any> place & time — naïve",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string"}, "items": {"type": "array"}},
                "required": ["place"],
            },
        },
    }
]
CALL = [
    {"role": "user", "content": "How windy is it in Mendoza?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "wind", "arguments": {"place": "Mendoza"}}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": '{"speed": 31.5}'},
    {"role": "assistant", "content": "<think>\nfast\n</think>\n\n31.5 m/s"},
    {"role": "user", "content": [{"type": "text", "text": "And in "}, {"type": "text", "text": "San Juan?"}]},
]

CHATML = """\
{% for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] | string | trim) + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}
"""
LLAMA_3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if 'tool_calls' in message and message.tool_calls %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("one at a time") }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {%- for part in message.content %}{{- part.text if part.type == 'text' else '' }}{%- endfor %}
        {%- else %}{{- message.content | trim }}{%- endif %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, roles must alternate: ' ~ message['role']) }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
QWEN_TOOLS = """\
{%- if tools %}
{{- '<|im_start|>system\\n# Tools\\n<tools>' }}
{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
{{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
    {%- if message.role == "assistant" %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- if loop.index0 > ns.last_query_index %}{{- reasoning.strip('\\n') }}{%- endif %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- for tool_call in message.tool_calls or [] %}
            {{- '<tool_call>\\n{"name": "' }}{{- tool_call.function.name }}{{- '", "arguments": ' }}
            {%- if tool_call.function.arguments is string %}{{- tool_call.function.arguments }}
            {%- else %}{{- tool_call.function.arguments | tojson }}{%- endif %}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' ~ content ~ '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
MANY_FEATURES = """\
{%- macro show(schema, depth=0) -%}
    {%- for name, value in schema.properties.items() | sort(attribute='0') -%}
        {{ '  ' * depth }}- {{ name|upper }}: {{ value.type|default('any') }}{{ "," if not loop.last }}
    {%- endfor -%}
{%- endmacro -%}
{% generation %}{% set inside = 1 %}{{ messages[-1].role }}{% endgeneration %}{{ inside is defined }}
{% for m in messages if m.role != 'system' %}{% if loop.index > 3 %}{% break %}{% endif %}{{ loop.cycle('a', 'b') }}{% endfor %}
{% for t in tools or [] %}{{ show(t.function.parameters, 1) }}{% endfor %}
{{ messages | map(attribute='role') | unique | join(', ') }}|{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ '%s-%03d %5.1f%%' % ('a', 7, 2.5) }}|{{ '%s' | format('x') }}|{{ '{:>4}|{a!r}'.format(1, a='q') }}
{{ [1, 2] + [3] }}|{{ (1, 'é') }}|{{ {'k': [None, true, 1.5]} }}|{{ 2 ** 10 }}|{{ 7 // 2 }}|{{ 'ab' * 3 }}|{{ 1 ~ none ~ 'x' }}
{{ 'a,b,,c'.split(',') | reject('equalto', '') | list }}|{{ 'l1\nl2' | indent(2) }}|{{ 'l1\nl2' | indent('> ', first=true) }}
{{ {'b': 1, 'a': '<é>'} | tojson(sort_keys=true) }}|{{ 'é' | tojson(ensure_ascii=true) }}|{{ [1] | tojson(separators=(',', ':')) }}
{{ '<a>' | e }}|{{ ('<a>' | safe) + '<b>' }}|{{ 'x-y' | replace('-', '_') }}|{{ 'a.b'.replace('.', '!') }}|{{ ', '.join(['p', 'q']) }}
{{ [3, 1, 2] | sort | first }}|{{ [1, 2, 3] | sum }}|{{ range(2, 9, 3) | list }}|{{ [1, 2, 3] | batch(2, 0) | list }}|{{ 2.345 | round(2) }}
{% set sep = joiner('; ') %}{% for x in 'abc' %}{{ sep() }}{{ x }}{% endfor %}|{{ dict(a=1).a }}|{{ missing }}|{{ messages[0].nothing }}
{% set block %}{{ bos_token }}-{{ eos_token }}{% endset %}{{ block | trim }}|{{ documents is none }}|{{ missing is defined }}
{% call(x) apply() %}[{{ x }}]{% endcall %}
"""
MANY_FEATURES = "{%- macro apply() -%}{{ caller(5) }}{%- endmacro -%}\n" + MANY_FEATURES

HONEST = {
    "chatml": (CHATML, TALK, {}),
    "chatml without a generation prompt": (CHATML, TALK[1:3], {"add_generation_prompt": False}),
    "llama 3": (LLAMA_3, TALK, {}),
    "llama 3 with tools": (LLAMA_3, CALL, {"tools": TOOLS, "date_string": "1 Jan 2030"}),
    "mistral": (MISTRAL, TALK, {}),
    "qwen": (QWEN_TOOLS, TALK, {"enable_thinking": False}),
    "qwen with tools": (QWEN_TOOLS, CALL, {"tools": TOOLS}),
    "many features": (MANY_FEATURES, TALK + CALL, {"tools": TOOLS}),
}
