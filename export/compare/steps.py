"""The script of a comparison: teacher-forced steps over a few rows, the same for every subject.

A ragged prefill, continuation chunks in which one row idles, a chunk that asks for the logits of each row's last token
only, and a decode step. Knows token ids and limits, nothing of what computes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ... import RequestError
from ...runtime import contract
from ...runtime.manifest import Limits

ROWS = 3
TOKENS = 48
"""Of the longest row; a model with a window gets more, so that the window closes."""

_WIDEST_WINDOW = 1024

TEXTS = (
    "The wind that the ancients called zonda comes down from the mountains hot and dry, and whoever crosses the valley "
    "on such a day learns to keep the shutters closed; orchards flower too early, and people sleep badly.",
    "In 1895 an engineer wrote: 'def speed(x): return x ** 2 / 3.6', and 12345 + 67890 = 80235.",
    "Una frase en castellano, eine auf Deutsch, und dann: 東京。",
)


@dataclass(frozen=True, slots=True)
class Step:
    """One call of the graph contract, in its shapes and dtypes, but for the state."""

    title: str
    input_ids: NDArray[np.int64]  # (B, S)
    seqlen_offsets: NDArray[np.int32]  # (B,)
    input_lens: NDArray[np.int32]  # (B,)
    logit_positions: NDArray[np.int64]  # (B, K)
    start_offsets_kernel: NDArray[np.int64]  # (B, S)

    @classmethod
    def of_feed(cls, feed: dict[str, NDArray[np.generic]], title: str = "") -> "Step":
        """A step from arrays by role."""
        return cls(
            title,
            feed[contract.INPUT_IDS].astype(np.int64),
            feed[contract.SEQLEN_OFFSETS].astype(np.int32),
            feed[contract.INPUT_LENS].astype(np.int32),
            feed[contract.LOGIT_POSITIONS].astype(np.int64),
            feed[contract.START_OFFSETS_KERNEL].astype(np.int64),
        )

    @property
    def feed(self) -> dict[str, NDArray[np.generic]]:
        """The arrays by role."""
        return {role: getattr(self, role) for role in contract.INPUTS}

    @property
    def lengths(self) -> NDArray[np.int32]:
        """(B,) tokens that each row has cached after the step."""
        return self.seqlen_offsets + self.input_lens

    def valid(self, tokens: int) -> NDArray[np.bool_]:
        """(B, tokens): which tokens of a tensor count; tokens is S for all, K for those whose logits are asked for."""
        batch, length = self.input_ids.shape
        positions = np.arange(length)[None].repeat(batch, 0) if tokens == length else self.logit_positions
        return np.asarray(positions < self.input_lens[:, None])


@dataclass(frozen=True, slots=True)
class Script:
    """capacity: positions of the cache buffers C; no step writes beyond them."""

    steps: tuple[Step, ...]
    rows: int
    capacity: int


def make_script(prompts: Sequence[Sequence[int]], limits: Limits, tokens: int = TOKENS) -> Script:
    """Plan the steps.

    Args:
        prompts: token ids; the first ROWS that have any are used, repeated or cut to length.
        limits: at most capacity tokens a row, max_batch rows, max_chunk new tokens of a row in a step.
        tokens: of the longest row, if the limits allow.

    Raises:
        RequestError: there is no prompt.
    """
    texts = [list(prompt) for prompt in prompts if len(prompt)][: min(ROWS, limits.max_batch)]
    if not texts:
        raise RequestError("there is no token to compare with: the prompts are empty")
    longest = max(1, min(tokens, limits.capacity))
    sizes = [max(1, longest - row * longest // 4) for row in range(len(texts))]
    rows = [
        np.resize(np.array(text, np.int64) % limits.vocab_size, size) for text, size in zip(texts, sizes, strict=True)
    ]
    steps: list[Step] = []
    offsets = np.zeros(len(rows), np.int32)
    for title, lens in _plan(sizes, limits.max_chunk):
        last_only = title == _LAST
        steps.append(_step(title, rows, offsets, np.array(lens, np.int32), last_only=last_only))
        offsets = offsets + steps[-1].input_lens
    widest = max(int(step.seqlen_offsets.max()) + step.input_ids.shape[1] for step in steps)
    return Script(tuple(steps), len(rows), widest + 1)


def tokens_for(windows: Sequence[int]) -> int:
    """How many tokens a row needs so that the narrowest attention window closes, within reason."""
    narrowest = min(windows, default=0)
    return max(TOKENS, narrowest + 16) if narrowest <= _WIDEST_WINDOW else TOKENS


def pseudo_random_prompts(vocab_size: int) -> list[list[int]]:
    """Prompts for models that come without a tokenizer: the same ids at every call."""
    rows = np.random.default_rng(0).integers(0, vocab_size, (ROWS, TOKENS))
    return [[int(token) for token in row] for row in rows]


_LAST = "last token only"


def _plan(sizes: Sequence[int], chunk: int) -> list[tuple[str, list[int]]]:
    left = list(sizes)
    plan: list[tuple[str, list[int]]] = []

    def take(title: str, wanted: Sequence[int]) -> None:
        lens = [max(0, min(chunk, have, want)) for have, want in zip(left, wanted, strict=True)]
        if any(lens):
            plan.append((title, lens))
            left[:] = [have - length for have, length in zip(left, lens, strict=True)]

    take("ragged prefill", [(size + 1) // 2 for size in sizes])
    kept = [4 - row for row in range(len(sizes))]  # for the last chunk, ragged too, and a token to decode
    turn = 1
    while any(have > keep for have, keep in zip(left, kept, strict=True)):
        idle = turn % len(sizes) if len(sizes) > 1 else None
        if all(have <= keep for row, (have, keep) in enumerate(zip(left, kept, strict=True)) if row != idle):
            idle = None
        title = "chunk" if idle is None else "chunk, one row idle"
        take(title, [0 if row == idle else left[row] - kept[row] for row in range(len(left))])
        turn += 1
    take(_LAST, [have - 1 for have in left])
    while any(left):
        take("decode", [1] * len(sizes))
    return plan


def _step(
    title: str,
    rows: Sequence[NDArray[np.int64]],
    offsets: NDArray[np.int32],
    lens: NDArray[np.int32],
    *,
    last_only: bool,
) -> Step:
    batch, width = len(rows), int(lens.max())
    ids = np.zeros((batch, width), np.int64)
    for b, row in enumerate(rows):
        ids[b, : lens[b]] = row[offsets[b] : offsets[b] + lens[b]]
    positions = np.arange(width)[None].repeat(batch, 0)
    wanted = np.maximum(lens - 1, 0)[:, None] if last_only else positions
    return Step(title, ids, offsets, lens, wanted.astype(np.int64), offsets[:, None].astype(np.int64) + positions)
