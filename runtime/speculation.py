"""Prompt-lookup speculation: drafts of what comes next, taken from what came before, and how long they should be.

A draft is what followed the last earlier place of the n-gram that a sequence ends with (Saxena 2023,
https://github.com/apoorvumang/prompt-lookup-decoding). One step of several tokens verifies it: its drafts are accepted
as far as they are what is sampled anyway, so speculation changes the time and not the text. Knows token ids and how
long steps took; nothing of engines, samplers or text.
"""

from collections import deque
from collections.abc import Sequence

LENGTHS = (2, 4, 8)
"""Tokens a row of a verifying step: the last sampled one, and drafts."""

_NGRAMS = (4, 3, 2)  # the longest is looked for first; a longer match is known only as far as it was followed
_LONG = 8  # matches of this length and more are judged together
_PRIOR = 0.5  # chance of a draft token of which nothing is known yet
_MEMORY = 1 / 8  # weight of the newest hit or miss in a chance
_MARGIN = 1.05  # an expected gain below this is left alone: it would be within the noise of the measured times
_WINDOW = 9  # step times whose median counts
_STALE = 512  # steps after which a length that was not used counts as not measured
_PRIOR_COST = 0.25  # of each token after the first, before it is measured: what 4-bit weights take on a CPU


class PromptLookup:
    """The drafts of one sequence: O(1) a token.

    Where the last match continues is followed token by token whether it is drafted or not. So its hits and misses, kept
    by the length of the match, say what a draft would be worth, at no cost and with no step spent on trying.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        """Begin with the tokens there are: prompt and output."""
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}  # n-gram -> index of what followed it last
        self._source: int | None = None  # index of the token that is expected next
        self._matched = 0  # tokens before it that equal the end of the sequence, as far as is known
        self._chances = [_PRIOR] * (_LONG + 1)  # by matched tokens
        for token in tokens[:-1]:
            self._tokens.append(token)
            self._register()
        self.push(tokens[-1])

    def push(self, token: int) -> None:
        """Take the next token of the sequence."""
        if self._source is not None:
            hit = self._tokens[self._source] == token
            known = min(self._matched, _LONG)
            self._chances[known] += _MEMORY * (hit - self._chances[known])
            self._source = self._source + 1 if hit else None
            self._matched += 1
        self._tokens.append(token)
        if self._source is None:
            self._search()
        self._register()

    def draft(self, count: int) -> list[int]:
        """The next tokens, if the match goes on: `count` of them or none. At its end it begins to repeat itself."""
        if self._source is None:
            return []
        period = len(self._tokens) - self._source
        return [self._tokens[self._source + i % period] for i in range(count)]

    def odds(self, count: int) -> list[float]:
        """The chance that the first, the first two, … the first `count` drafts are right; empty if there are none."""
        odds: list[float] = []
        chance = 1.0
        for i in range(count if self._source is not None else 0):
            chance *= self._chances[min(self._matched + i, _LONG)]
            odds.append(chance)
        return odds

    def _search(self) -> None:
        for ngram in self._ending():
            self._source = self._places.get(ngram)
            if self._source is not None:
                self._matched = len(ngram)
                return

    def _register(self) -> None:
        for ngram in self._ending():
            self._places[ngram] = len(self._tokens)

    def _ending(self) -> list[tuple[int, ...]]:
        """The n-grams that the tokens end with, longest first."""
        return [tuple(self._tokens[-n:]) for n in _NGRAMS if n <= len(self._tokens)]


class StepCosts:
    """What a step of several tokens a row costs, in steps of one: measured while running, by number of rows."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, int], deque[float]] = {}
        self._median: dict[tuple[int, int], float] = {}
        self._used: dict[tuple[int, int], int] = {}
        self._steps = 0

    def record(self, batch: int, length: int, seconds: float) -> None:
        """Note the time of a step; the first of its shape, which also pays for its buffers, is left out."""
        shape = (batch, length)
        self._steps += 1
        self._used[shape] = self._steps
        seen = self._seconds.get(shape)
        if seen is None:
            self._seconds[shape] = deque(maxlen=_WINDOW)
            return
        seen.append(seconds)
        self._median[shape] = sorted(seen)[len(seen) // 2]

    def ratio(self, batch: int, length: int) -> float:
        """The time of a step of `length` tokens a row by that of one; an estimate while it is not known."""
        several, one = self._known(batch, length), self._known(batch, 1)
        return several / one if several and one else 1 + _PRIOR_COST * (length - 1)

    def _known(self, batch: int, length: int) -> float | None:
        if self._steps - self._used.get((batch, length), 0) > _STALE:
            return None
        return self._median.get((batch, length))


def choose_length(odds: Sequence[Sequence[float]], costs: StepCosts, longest: int) -> int:
    """Tokens a row of the next step: as many as promise the most accepted tokens a second; 1 is to draft nothing.

    Args:
        odds: of each row, from `PromptLookup.odds`.
        costs: what was measured.
        longest: tokens a row that the engine takes.
    """
    batch = len(odds)
    best, best_gain = 1, _MARGIN
    if not any(odds):
        return best
    for length in LENGTHS:
        if length > longest:
            break
        accepted = sum(sum(row[: length - 1]) for row in odds)
        gain = (1 + accepted / batch) / costs.ratio(batch, length)
        if gain > best_gain:
            best, best_gain = length, gain
    return best
