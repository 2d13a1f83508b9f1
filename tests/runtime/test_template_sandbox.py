"""Chat templates that are hostile: what they may not reach, and that they end, in little time and memory."""

import contextlib
import gc
import resource
import sys
import threading
import time

import pytest
from chat_templates import CHATML, SPECIAL, TALK, TOOLS

from zonda import ChatTemplateError
from zonda.runtime import template_sandbox
from zonda.runtime.chat_template import ChatTemplate

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
