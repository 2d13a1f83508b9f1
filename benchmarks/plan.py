"""What to measure: the cases of a round, how often, and the prompts. It knows nothing of processes or results."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Case:
    """One run of a round: `batch` rows at once, each with another prompt of `prompt_tokens` tokens."""

    prompt_tokens: int
    batch: int = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    pairs: rounds, each with one run of every runtime in every case. loads: how often each is started. text_ids: the
    text that prompts are cut from. quality_ids: the text whose logits are compared, in whole windows; empty for none.
    """

    cases: tuple[Case, ...]
    new_tokens: int
    pairs: int
    threads: int
    loads: int
    text_ids: tuple[int, ...]
    quality_ids: tuple[int, ...] = ()
    wait_s: float = 30.0

    def prompts(self, case: Case, number: int) -> list[list[int]]:
        """The prompts of one round: each from a place of its own, which moves on with the round's number."""
        return [self._cut(case.prompt_tokens, 37 * number + 101 * row) for row in range(case.batch)]

    def wake_prompt(self, case: Case, number: int) -> list[int]:
        """A prompt as long, that shares no prefix with those of the round."""
        return self._cut(case.prompt_tokens, 37 * number + len(self.text_ids) // 2 + 1)

    def _cut(self, length: int, start: int) -> list[int]:
        return [self.text_ids[(start + i) % len(self.text_ids)] for i in range(length)]


def cases(prompts: Sequence[int], batches: Sequence[int], longest_batch_prompt: int) -> tuple[Case, ...]:
    """Every prompt length alone, and in every batch if it is not too long for that."""
    return tuple(
        Case(prompt, batch)
        for batch in sorted(set(batches))
        for prompt in sorted(set(prompts))
        if batch == 1 or prompt <= longest_batch_prompt
    )
