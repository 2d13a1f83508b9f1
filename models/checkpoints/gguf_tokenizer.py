"""The tokenizer in a GGUF's metadata, rebuilt as tokenizer.json: byte-level BPE with its right pre-tokenizer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ... import CheckpointError

_CONTROL, _USER_DEFINED = 3, 4  # token types of GGUF

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
_PLAIN = {"gpt-2", "gpt2", "olmo", "phi-2", "jais"}
_REGEX = dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx", "falcon3"), _LLAMA3) | {
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "stablelm2": _QWEN2,
}
"""`tokenizer.ggml.pre` -> how text is split, as these models' own tokenizer.json files do it."""


def tokenizer_files(path: Path, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json, generation_config.json and chat_template.jinja from metadata.

    Raises:
        CheckpointError: no tokenizer, one of a kind that is not supported, or one that contradicts itself.
    """
    read = _Reader(path, metadata)
    model = metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise CheckpointError(
            f"{path}: its tokenizer is of the kind {model!r}; only byte-level BPE ('gpt2') is supported so far"
        )
    tokens = read.texts("tokenizer.ggml.tokens")
    tokenizer = _tokenizer(read, tokens)
    special = {
        name: tokens[i] for name in ("bos", "eos", "unknown", "padding") if (i := read.token_id(name)) is not None
    }
    config = {f"{hf}_token": special[name] for name, hf in _HF_NAMES.items() if name in special}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    ends = [i for name in ("eos", "eot") if (i := read.token_id(name)) is not None]
    generation = {"eos_token_id": list(dict.fromkeys(ends))}
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=False).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
        "generation_config.json": json.dumps(generation, indent=2).encode(),
    }
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        files["chat_template.jinja"] = template.encode()
    return files


_HF_NAMES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}


class _Reader:
    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self.metadata = metadata

    def texts(self, key: str) -> list[str]:
        value = self.metadata.get(key)
        if not isinstance(value, list) or not value or not isinstance(value[0], str):
            raise self.error(f"{key} must be a list of texts")
        return value

    def token_id(self, name: str) -> int | None:
        value = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is None or value == 0xFFFFFFFF:
            return None
        if not isinstance(value, int) or not 0 <= value < len(self.texts("tokenizer.ggml.tokens")):
            raise self.error(f"tokenizer.ggml.{name}_token_id is {value!r}, no token's number")
        return value

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")


def _tokenizer(read: _Reader, tokens: list[str]) -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise read.error("tokenizer.ggml.tokens names a token twice")
    merges = [tuple(merge.split(" ", 1)) for merge in read.texts("tokenizer.ggml.merges")]
    pre = str(read.metadata.get("tokenizer.ggml.pre"))
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=_REGEX.get(pre) is _LLAMA3))  # type: ignore[arg-type]
    except Exception as error:  # tokenizers raises bare Exception
        raise read.error(f"tokens and merges do not make a BPE tokenizer: {error}") from error
    tokenizer.pre_tokenizer = _pre_tokenizer(read, pre)
    tokenizer.decoder = decoders.ByteLevel()
    if _REGEX.get(pre) is _QWEN2 and pre != "stablelm2":
        tokenizer.normalizer = normalizers.NFC()
    types = read.metadata.get("tokenizer.ggml.token_type", [])
    if not isinstance(types, list) or len(types) not in (0, len(tokens)):
        raise read.error("tokenizer.ggml.token_type must have one entry a token")
    for token, kind in zip(tokens, types, strict=False):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    bos, eos = read.token_id("bos"), read.token_id("eos")
    front = bos is not None and read.metadata.get("tokenizer.ggml.add_bos_token", _REGEX.get(pre) is _LLAMA3)
    back = eos is not None and read.metadata.get("tokenizer.ggml.add_eos_token", False)
    if front or back:
        parts = [*([tokens[bos]] if front else []), "$A", *([tokens[eos]] if back else [])]  # type: ignore[index]
        pairs = [(tokens[i], i) for i in {bos, eos} if i is not None]
        tokenizer.post_processor = processors.TemplateProcessing(single=parts, special_tokens=pairs)
    return tokenizer


def _pre_tokenizer(read: _Reader, pre: str) -> pre_tokenizers.PreTokenizer:
    if pre in _PLAIN:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in _DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if pre in _REGEX:
        split = pre_tokenizers.Split(Regex(_REGEX[pre]), "isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join(sorted({*_PLAIN, *_DIGITS, *_REGEX}))
    raise read.error(f"its pre-tokenizer {pre!r} (tokenizer.ggml.pre) is not supported; known: {known}")
