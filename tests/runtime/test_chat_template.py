"""Chat templates: equal to transformers on honest templates, and clear about what they cannot render."""

import enum
import json
import time

import pytest
from chat_templates import CALL, CHATML, HONEST, MISTRAL, QWEN_TOOLS, SPECIAL, TALK, TOOLS
from transformers.utils.chat_template_utils import render_jinja_template

from zonda import ChatTemplateError, RequestError
from zonda.runtime.chat_template import ChatTemplate


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
