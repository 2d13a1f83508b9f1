"""Chat templates: equal to transformers on honest templates, and closed to hostile ones."""

import contextlib
import enum
import gc
import json
import resource
import sys
import threading
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from zonda import ChatTemplateError, RequestError
from zonda.runtime import template_sandbox
from zonda.runtime.chat_template import ChatTemplate

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


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_template_renders_as_transformers_renders_it(name):
    source, messages, options = HONEST[name]
    given = {"add_generation_prompt": True} | options
    (expected,), _ = render_jinja_template([messages], chat_template=source, **SPECIAL, **given)
    assert ChatTemplate(source, **SPECIAL).render(messages, **options) == expected
    assert len(expected) > 60


def test_a_loop_may_be_left_inside_a_generation_block():
    """In transformers this is a syntax error of Python: its block is a function."""
    source = "{% for m in messages %}{% generation %}{% if loop.index == 2 %}{% break %}{% endif %}x{% endgeneration %}{% endfor %}"
    assert ChatTemplate(source).render(TALK) == "x"


def test_the_template_s_own_message_reaches_the_caller():
    with pytest.raises(ChatTemplateError, match=r"refuses this conversation: After the optional.*alternate: assistant"):
        ChatTemplate(MISTRAL, **SPECIAL).render([TALK[2], TALK[2]])


def test_the_date_is_today_s():
    before = time.strftime("%d %b %Y")
    found = ChatTemplate("{{ strftime_now('%d %b %Y') }}").render(TALK)
    assert found in (before, time.strftime("%d %b %Y"))


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ a", "{% for x in y %}", "{{ 1 | nofilter }}", "{% generation %}", "{% frob %}"]
)
def test_a_syntax_error_is_found_at_once(source):
    with pytest.raises(ChatTemplateError, match="not valid Jinja"):
        ChatTemplate(source)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hi",
        {"role": "user"},
        None,
        3,
        [3],
        ["hi"],
        [{}],
        [{"role": 3}],
        [{"content": "x"}],
        [TALK[0], {"role": None}],
    ],
    ids=repr,
)
def test_messages_that_are_none_are_refused(messages):
    with pytest.raises(RequestError, match=r"a conversation is a list|a message is a mapping"):
        ChatTemplate(CHATML).render(messages)


@pytest.mark.parametrize("value", [object(), b"bytes", {1, 2}, len], ids=["object", "bytes", "set", "function"])
def test_values_that_are_not_json_are_refused_by_type(value):
    with pytest.raises(RequestError, match=f"found a {type(value).__name__}"):
        ChatTemplate(CHATML).render([{"role": "user", "content": value}])
    with pytest.raises(RequestError, match=f"found a {type(value).__name__}"):
        ChatTemplate(CHATML).render(TALK, extra=[value])


def test_a_role_from_an_enumeration_is_its_text():
    role = enum.Enum("Role", {"USER": "user"}, type=str).USER
    assert ChatTemplate("{{ messages[0].role }}").render([{"role": role}]) == "user"


def test_what_the_caller_gave_is_not_changed():
    before = json.dumps([CALL, TOOLS])
    ChatTemplate(QWEN_TOOLS).render(CALL, tools=TOOLS)
    assert json.dumps([CALL, TOOLS]) == before


def test_a_variable_goes_before_a_special_token():
    assert ChatTemplate("{{ bos_token }}", bos_token="a").render(TALK, bos_token="b") == "b"


def test_a_long_conversation_fits_into_the_budget():
    """A thousand messages of a thousand characters, and one of two million."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"{i} " * 250} for i in range(1000)]
    messages[0]["content"] = "x" * 2_000_000
    for source in (CHATML, QWEN_TOOLS, MISTRAL):
        text = ChatTemplate(source, **SPECIAL).render(messages)
        assert len(text) > sum(len(m["content"].strip()) for m in messages)


DOUBLE = "{%% set ns = namespace(x=%s) %%}{%% for i in range(60) %%}%s{%% endfor %%}"
MEGABYTE = "{% set ns = namespace(x='ab') %}{% for i in range(19) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
REACHING = {
    "class": "{{ ''.__class__ }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by item": "{{ ''['__class__'] }}",
    "attr filter": "{{ ''|attr('__class__') }}",
    "map attribute": "{{ ['']|map(attribute='__class__')|list }}",
    "sort attribute": "{{ messages|sort(attribute='__class__') }}",
    "cycler globals": "{{ cycler.__init__.__globals__.os }}",
    "joiner globals": "{{ joiner.__init__.__globals__ }}",
    "namespace globals": "{{ namespace.__init__.__globals__ }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "function globals": "{{ raise_exception.__globals__ }}",
    "macro": "{% macro m() %}{% endmacro %}{{ m._func }}",
    "self": "{{ self._TemplateReference__context }}",
    "loop": "{% for m in messages %}{{ loop.__class__ }}{% endfor %}",
    "undefined": "{{ missing.__init__.__globals__ }}",
    "generator": "{{ (messages|map(attribute='role')).gi_frame }}",
    "format string": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "format map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "namespace with a class": "{{ namespace(__class__=1) }}",
    "namespace that is called": "{% set ns = namespace() %}{% set ns.__call__ = 1 %}",
    "namespace that takes the context": "{% set ns = namespace() %}{% set ns.jinja_pass_arg = 1 %}",
    "change messages": "{{ messages.append(1) }}",
    "change a message": "{{ messages[0].update({'role': 'x'}) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
}
ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "endless output": "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "recursion that fans out": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "loops inside filters": "{% for i in range(99999) %}{{ range(99999)|map('string')|list|length }}{% endfor %}",
    "work inside methods": MEGABYTE + "{% for i in range(99999) %}{{ ns.x.count('ba') }}{% endfor %}",
    "nested without end": "{% set ns = namespace(x=1) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
}
QUADRATIC = {
    # in C, where nothing could end them
    "strip": MEGABYTE + "{{ ns.x.strip('c' * 1000000 + 'ab') }}",
    "trim": MEGABYTE + "{{ ns.x|trim('c' * 1000000 + 'ab') }}",
    "search backwards": "{{ ('a' * 4000000).rfind('ab' + 'a' * 2000000) }}",
    "split backwards": "{{ ('a' * 4000000).rsplit(sep='ab' + 'a' * 2000000) }}",
    "read a percent format": "{{ ('%(' * 2000000) % 1 }}",
    "colliding numbers": "{% set text %}{% for i in range(20000) %}{{ i * 2305843009213693951 }},{% endfor %}{% endset %}"
    "{% set pairs = text.split(',')|map('int')|batch(2, 0)|list %}{{ dict(pairs)|length }}",
    "colliding names": "{% set text %}{% for i in range(20000) %}{{ i * 2305843009213693951 }},{% endfor %}{% endset %}"
    "{% set pairs = text.split(',')|map('int')|batch(2, 0)|list %}{{ namespace(pairs) }}",
    "subtract keys": "{{ messages[0].keys() - [] }}",
    "nested tuples, hashed": "{% set ns = namespace(x=1) %}{% for i in range(60000) %}{% set ns.x = (ns.x,) %}{% endfor %}"
    "{{ {ns.x: 1}|length }}",
}
GROWING = {
    "repeat": "{{ 'a' * 10**9 }}",
    "repeat from the left": "{{ 1000000000 * 'a' }}",
    "repeat a list": "{{ [0] * 1000000000 }}",
    "power": "{{ 2 ** 1000000000 }}",
    "large number": "{{ ('f' * 1000000)|int(0, 16) }}",
    "round": "{{ 5|round(-1000000000) }}",
    "center": "{{ 'a'.center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "center filter": "{{ 'a'|center(1000000000) }}",
    "bytes": "{{ 'a'.encode().center(1000000000) }}",
    "bytes of a number": "{{ (1).to_bytes(1000000000, 'big') }}",
    "format width": "{{ '{:>1000000000}'.format(1) }}",
    "format width from an argument": "{{ '{:>{}}'.format(1, 1000000000) }}",
    "format many": "{{ ('{0}' * 3000).format('a' * 1000000) }}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "percent width from an argument": "{{ '%*d' % (1000000000, 1) }}",
    "percent precision": "{{ '%.1000000000f'|format(1.0) }}",
    "percent many": "{{ ('%(a)s' * 2000) % {'a': 'x' * 1000000} }}",
    "range": "{{ range(1000000000)|list }}",
    "batch": "{{ [1]|batch(1000000000, 0)|list }}",
    "slice": "{{ [1]|slice(1000000000)|list }}",
    "indent": "{{ 'a\nb'|indent(1000000000) }}",
    "tojson indent": "{{ [1]|tojson(indent=1000000000) }}",
    "tojson separators": MEGABYTE + "{{ range(9999)|list|tojson(separators=(ns.x, ':')) }}",
    "date": "{{ strftime_now('%A' * 1000000) }}",
    "translate": "{{ ('a' * 100000).translate({97: 'b' * 1000000}) }}",
    "join": MEGABYTE + "{{ ns.x|join(ns.x) }}",
    "join method": MEGABYTE + "{{ ns.x.join(ns.x) }}",
    "replace": MEGABYTE + "{{ ns.x|replace('', ns.x) }}",
    "replace method": MEGABYTE + "{{ ns.x.replace('a', ns.x) }}",
    "add often": MEGABYTE + "{{ (" + " ~ ".join(["ns.x"] * 5000) + ")|length }}",
    "keep many": MEGABYTE + "".join(f"{{% set v{i} = ns.x ~ {i} %}}" for i in range(2000)),
    "raw text": "{% set y %}{% for i in range(99999) %}" + "z" * 100_000 + "{% endfor %}{% endset %}",
    "methods of texts": "{% set m = ('a' * 1000000)|safe %}{{ [m.upper] * 4000000 }}",
    "sum of lists": "{{ range(99999)|batch(2)|sum(start=[]) }}",
    "double with +": DOUBLE % ("'a'", "{% set ns.x = ns.x + ns.x %}"),
    "double with ~": DOUBLE % ("'a'", "{% set ns.x = ns.x ~ ns.x %}"),
    "double with a block": DOUBLE % ("'a'", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
    "double with join": DOUBLE % ("'a'", "{% set ns.x = [ns.x, ns.x]|join %}"),
    "shared lists, printed": DOUBLE % ("1", "{% set ns.x = [ns.x, ns.x] %}") + "{{ ns.x }}",
    "shared lists, compared": DOUBLE % ("1, y=1", "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}")
    + "{{ ns.x == ns.y }}",
    "shared tuples, hashed": DOUBLE % ("1", "{% set ns.x = (ns.x, ns.x) %}") + "{{ {ns.x: 1} }}",
    "shared mappings, as JSON": DOUBLE % ("1", "{% set ns.x = {'a': ns.x, 'b': ns.x} %}") + "{{ ns.x|tojson }}",
    "shared by dict": DOUBLE % ("1", "{% set ns.x = dict(a=ns.x, b=ns.x) %}"),
    "shared by arguments": "{% set ns = namespace(x=1) %}{% macro m() %}{% set ns.x = varargs %}{% endmacro %}"
    "{% for i in range(60) %}{{ m(ns.x, ns.x) }}{% endfor %}{{ ns.x == ns.x[0] }}",
    "constants": "{{ 'x'" + "|replace('', 'yyyyyyyyyy')" * 40 + " }}",
}
TOO_MUCH_TO_COMPILE = {
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested blocks": "{% if a %}" * 300 + "{% endif %}" * 300,
    "nested for": "{% for a in b %}" * 30 + "{% endfor %}" * 30,
    "long sum": "{{ " + "1+" * 20000 + "1 }}",
    "long source": "a" * (1 << 20),
}


REASONS = [
    (REACHING, r"may not use|may not store|No filter named|'lipsum' is undefined|no loader for this environment"),
    (ENDLESS, r"does not come to an end|too large|too deep|RecursionError"),
    (QUADRATIC, r"searches for|format of|too large|not numbers|too deep"),
    (GROWING, r"too (large|many|deep)|pads to|too long|not numbers|may not use|No filter named|come to an end"),
    (TOO_MUCH_TO_COMPILE, r"recursion depth|too many statically nested blocks|characters; at most"),
]
HOSTILE = {name: (source, reason) for group, reason in REASONS for name, source in group.items()}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused_for_what_it_does_in_little_time_and_memory(name):
    source, reason = HOSTILE[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    with pytest.raises(ChatTemplateError, match=reason):
        ChatTemplate(source, **SPECIAL).render(TALK, tools=TOOLS)
    assert time.monotonic() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10


def test_what_the_garbage_collector_calls_does_not_end_the_deadline(monkeypatch):
    """Exceptions in its callbacks are swallowed, and with them what would have interrupted the template."""
    monkeypatch.setattr(template_sandbox, "_MAX_SECONDS", 0.2)
    late = []

    def sleep_once(phase, info):
        if sys.gettrace() is not None and not late:  # that is, within the rendering
            late.append(phase)
            time.sleep(0.3)
            sleep_once(phase, info)  # a call after the deadline

    gc.callbacks.append(sleep_once)
    try:
        with pytest.raises(ChatTemplateError, match="does not come to an end"):
            ChatTemplate("{{ [1]|slice(3000000)|list }}").render(TALK)
    finally:
        gc.callbacks.remove(sleep_once)
    assert late


def test_a_namespace_does_not_print_what_it_holds():
    """Its text would double with each level, outside of what can be weighed."""
    source = DOUBLE % ("1", "{% set ns.x = namespace(a=ns.x, b=ns.x) %}") + "{{ ns.x }}"
    assert ChatTemplate(source).render(TALK) == "<Namespace>"


@pytest.mark.parametrize("source", [CHATML, "{{ 1 / 0 }}", ENDLESS["nested loops"]])
def test_tracing_is_afterwards_what_it_was(source):
    """So that a debugger or a coverage tool goes on working."""

    def tracer(frame, event, argument):
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        with contextlib.suppress(ChatTemplateError):
            ChatTemplate(source).render(TALK)
        found = sys.gettrace()
    finally:
        sys.settrace(before)
    assert found is tracer


def test_threads_render_at_once_each_with_its_own_budget():
    template = ChatTemplate("{% for i in range(n) %}{{ 'x' }}{% endfor %}")
    endless = ChatTemplate(ENDLESS["nested loops"])
    results: dict[int, str] = {}

    def work(n: int) -> None:
        try:
            results[n] = (endless if n == 3 else template).render(TALK, n=n * 1000)
        except ChatTemplateError as error:
            results[n] = str(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {n: len(text) for n, text in results.items() if n != 3} == {0: 0, 1: 1000, 2: 2000, 4: 4000, 5: 5000}
    assert "does not come to an end" in results[3]
