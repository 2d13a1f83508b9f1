"""The text that all prompts are cut from, as token ids of the model."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from . import BenchmarkError

TEXT = Path(__file__).with_name("prompt.txt")


def text_ids(folders: Sequence[Path]) -> tuple[int, ...]:
    """Token ids of the text, by the first tokenizer.json that the runtimes' models have; without special tokens."""
    for folder in folders:
        file = folder / "tokenizer.json"
        if file.exists():
            encoded = Tokenizer.from_file(str(file)).encode(TEXT.read_text("utf-8"), add_special_tokens=False)
            return tuple(encoded.ids)
    raise BenchmarkError(f"no tokenizer.json in any of: {', '.join(map(str, folders))}")
