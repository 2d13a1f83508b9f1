"""From sampled tokens to text that can be shown: whole characters only, and no part of a stop string."""

from collections.abc import Sequence

from tokenizers import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Decodes token by token; what was pushed and flushed adds up to the tokenizer's decoding of all ids.

    A token's text may depend on the one before it and may end inside a character, so the last tokens are decoded
    again with each new one, and text is given out once it ends on a whole character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # where the window that is decoded again begins
        self._given = 0  # tokens of which the text was given out

    def push(self, token_id: int) -> str:
        """Take a token; return the text that is now certain."""
        self._ids.append(token_id)
        known = self._decode(self._start, self._given)
        text = self._decode(self._start, len(self._ids))
        if len(text) <= len(known) or text.endswith(_REPLACEMENT):
            return ""
        self._start, self._given = self._given, len(self._ids)
        return text[len(known) :]

    def flush(self) -> str:
        """Return what was held back: the rest of an unfinished character, as a replacement character."""
        known = self._decode(self._start, self._given)
        text = self._decode(self._start, len(self._ids))
        self._start = self._given = len(self._ids)
        return text[len(known) :]

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)


class StopStrings:
    """Cuts a stream of text before the first stop string, without ever letting a part of one through."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Take text; return what may be shown, and the stop string if one is complete (the one that ends first)."""
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
