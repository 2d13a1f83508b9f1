"""The texts, as token ids of the model: what all prompts are cut from, and what perplexity is taken of."""

from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer

from . import BenchmarkError

TEXT = Path(__file__).with_name("prompt.txt")


def model_tokenizer(folders: Sequence[Path]) -> Tokenizer:
    """The first tokenizer.json that the runtimes' models have."""
    for folder in folders:
        file = folder / "tokenizer.json"
        if file.exists():
            return Tokenizer.from_file(str(file))
    raise BenchmarkError(f"no tokenizer.json in any of: {', '.join(map(str, folders))}")


def text_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids of the prompts' text, without special tokens."""
    return tuple(tokenizer.encode(TEXT.read_text("utf-8"), add_special_tokens=False).ids)


def manual_ids(tokenizer: Tokenizer, count: int) -> tuple[int, ...]:
    """The first `count` token ids of Python's own manual, which lies on every machine.

    Raises:
        BenchmarkError: the manual is shorter.
    """
    manual = "\n".join(text for _, text in sorted(topics.items()))
    ids = tokenizer.encode(manual, add_special_tokens=False).ids
    if len(ids) < count:
        raise BenchmarkError(f"Python's manual has {len(ids)} tokens of this model, not {count}")
    return tuple(ids[:count])
