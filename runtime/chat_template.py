"""Chat templates: from messages to the text a model was trained on, as `transformers` renders it.

The template is foreign code and runs in `template_sandbox`. Knows nothing of tokenizers, bundles or models.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .. import ChatTemplateError, RequestError
from .template_sandbox import compile_template, plain, render_template

_MAX_SOURCE = 128 << 10  # characters; the longest of the hub have 25,000


class ChatTemplate:
    """A compiled template.

    Thread safety: may be rendered from any thread; each rendering has a sandbox of its own.
    """

    def __init__(self, source: str, **special_tokens: str) -> None:
        """Compile.

        Args:
            source: Jinja, as in `chat_template.jinja`.
            special_tokens: variables such as bos_token and eos_token.

        Raises:
            ChatTemplateError: a syntax error, an unknown filter, or far too long.
        """
        if len(source) > _MAX_SOURCE:
            raise ChatTemplateError(f"the chat template has {len(source)} characters; at most {_MAX_SOURCE} are taken")
        self._special_tokens = special_tokens
        try:
            self._code = compile_template(source)
        except Exception as error:  # Jinja's own errors, and what Python's compiler says of absurd nesting
            raise ChatTemplateError(f"the chat template is not valid Jinja: {_say(error)}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as text.

        Args:
            messages: each with a `role`, usually a `content`; not changed.
            add_generation_prompt: end where the assistant is to speak.
            tools: JSON schemas of functions, for templates that know them.
            variables: more of what this template asks for; they go before special tokens of the same name.

        Raises:
            RequestError: messages are empty or have no role, or a value is not JSON.
            ChatTemplateError: the template refuses them, fails, or exceeds its budget.
        """
        if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
            raise RequestError(f"a conversation is a list of at least one message, found {messages!r:.100}")
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise RequestError(f"a message is a mapping with a role that is text, found {message!r:.100}")
        given = {"documents": None} | self._special_tokens | variables
        given |= {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            return render_template(self._code, plain(given))
        except (ChatTemplateError, RequestError):
            raise
        except Exception as error:  # a template may raise whatever Python can
            raise ChatTemplateError(f"the chat template failed: {type(error).__name__}: {_say(error)}") from error


def _say(error: Exception) -> str:
    return str(error)[:500]
