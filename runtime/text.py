"""From sampled tokens to text that can be shown: whole characters only, and no part of a stop string.

Knows a tokenizer's decoding; nothing of sampling, requests or streams.
"""

import re
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class TokenTexts:
    """What single tokens say, found out as they come and kept: most steps then need no decoding at all.

    A byte-level decoder joins the bytes of all tokens, so a token that holds whole characters says the same anywhere.
    Other decoders look at neighbours (a leading space, a run of byte tokens), and nothing is kept for them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self.byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._texts: dict[int, str | None] = {}

    def of(self, token_id: int) -> str | None:
        """The text of a token wherever it stands between whole characters; None if it depends on its neighbours."""
        try:
            return self._texts[token_id]
        except KeyError:
            text = self.decode([token_id]) if self.byte_level else None
            self._texts[token_id] = None if text is None or text.endswith(_REPLACEMENT) else text
            return self._texts[token_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens; special ones and ids outside the vocabulary have none."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class Detokenizer:
    """Decodes token by token; what was pushed and flushed adds up to the tokenizer's decoding of all ids.

    A token's text may depend on the one before it, so the tokens since the last but one whole character are decoded
    again with each new one. (`tokenizers.decoders.DecodeStream` does the same, but raises "Invalid prefix" when
    malformed bytes change what came before, and cannot give out an unfinished end.) Two things are held back:

    - a replacement character at the end, which may be the beginning of a character that the next token completes;
    - a run of byte tokens (`<0xE4>`), because decoders with byte fallback replace a whole run if any of it is
      malformed: its text is certain only when another token follows.
    """

    def __init__(self, texts: TokenTexts) -> None:
        """Begin a text; all texts of a model share one `TokenTexts`."""
        self._texts = texts
        self._window: list[int] = []  # the tokens that are decoded together
        self._whole = 0  # the first tokens of the window, up to a place where its text ended on a whole character
        self._shown = 0  # the first characters of the window's text, which were given out

    def push(self, token_id: int) -> str:
        """Take a token; return the text that is now certain. Ids outside the vocabulary have no text."""
        if not self._window and (known := self._texts.of(token_id)) is not None:
            return known
        token = self._texts.tokenizer.id_to_token(token_id)
        if token is None or token_id in self._texts.special:
            return ""
        self._window.append(token_id)
        if token.startswith("<0x") and _BYTE_TOKEN.fullmatch(token):
            return ""
        text = self._texts.decode(self._window)
        if text.endswith(_REPLACEMENT):
            certain = text[self._shown : -1]
            self._shown = len(text) - 1
            self._cut_malformed(text)
            return certain
        certain = text[self._shown :]
        if self._texts.byte_level:  # what follows whole characters does not depend on them
            self._window, self._whole, self._shown = [], 0, 0
            return certain
        recent = self._window[self._whole :]
        recent_text = self._texts.decode(recent)
        # Without text of its own the recent part could not stand for "something came before" to a decoder that
        # strips a leading space.
        if recent_text:
            self._window, self._whole, text = recent, len(recent), recent_text
        self._shown = len(text)
        return certain

    def flush(self) -> str:
        """Return what was held back: the rest of an unfinished character, as a replacement character."""
        text = self._texts.decode(self._window)
        certain = text[self._shown :]
        self._shown = len(text)
        return certain

    def _cut_malformed(self, text: str) -> None:
        """Drop tokens from a window that ends in malformed bytes, if the last one does not continue those before it."""
        before, last_two, last_but_one = (
            self._texts.decode(part) for part in (self._window[:-1], self._window[-2:], self._window[-2:-1])
        )
        last = last_two.removeprefix(last_but_one)
        if last and last != last_two and before + last == text:
            self._window, self._whole, self._shown = self._window[-2:], 1, len(last_two) - 1


class StopStrings:
    """Cuts a stream of text before the first stop string, without ever letting a part of one through."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Take text; return what may be shown, and the stop string if one is complete.

        Of several the one that ends first counts, of those the longest, as if the text came letter by letter.
        """
        if not self._stops:
            return text, None
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, stop = min(found, key=lambda entry: (entry[0] + len(entry[1]), entry[0]))
            shown, self._held = self._held[:at], ""
            return shown, stop
        keep = max(self._overlap(stop) for stop in self._stops)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown, None

    def flush(self) -> str:
        """Return what was held back: it turned out not to be a stop string."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """The longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
