"""The tokenizer in a GGUF's metadata, rebuilt as the files that an HF checkpoint has: byte-level BPE only."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ... import CheckpointError
from .gguf_pre_tokenizers import PRE_TOKENIZERS, PreTokenizer

_CONTROL, _USER_DEFINED = 3, 4  # token types of GGUF
_NO_TOKEN = 0xFFFFFFFF
_HF_NAMES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_ENDS_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
"""Control tokens that end an answer, where the chat template says so; files often name only the end of a document."""


def tokenizer_files(path: Path, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json, generation_config.json and chat_template.jinja from metadata.

    Raises:
        CheckpointError: no tokenizer, one of a kind that is not supported, or one that contradicts itself.
    """
    read = _Reader(path, metadata)
    model = metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise read.error(f"its tokenizer is of the kind {model!r}; only byte-level BPE ('gpt2') is supported so far")
    name = metadata.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise read.error(f"its pre-tokenizer {name!r} (tokenizer.ggml.pre) is not supported; known: {known}")
    pre, tokens = PRE_TOKENIZERS[name], read.tokens()
    types = read.types(len(tokens))
    special = {hf: i for gguf, hf in _HF_NAMES.items() if (i := token_id(path, metadata, gguf)) is not None}
    add = {
        f"add_{which}_token": read.boolean(f"tokenizer.ggml.add_{which}_token", default)
        for which, default in (("bos", pre.add_bos and "bos_token" in special), ("eos", False))
    }
    front, back = (_added(read, add, special, which) for which in ("bos", "eos"))
    template = metadata.get("tokenizer.chat_template", "")
    if not isinstance(template, str):
        raise read.error("tokenizer.chat_template is no text")
    config: dict[str, Any] = {hf: tokens[i] for hf, i in special.items()} | add
    config |= {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    generation: dict[str, Any] = {f"{hf}_id": special[hf] for hf in ("bos_token", "pad_token") if hf in special}
    generation["eos_token_id"] = _end_ids(read, tokens, types, template)
    files = {
        "tokenizer.json": _tokenizer(read, pre, tokens, types, front, back).to_str(pretty=False).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
        "generation_config.json": json.dumps(generation, indent=2).encode(),
    }
    if template:
        files["chat_template.jinja"] = template.encode()
    return files


def token_id(path: Path, metadata: Mapping[str, Any], name: str) -> int | None:
    """The number under `tokenizer.ggml.{name}_token_id`, None where there is none.

    Raises:
        CheckpointError: it is no token's number.
    """
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if value is None or value == _NO_TOKEN:
        return None
    tokens = metadata.get("tokenizer.ggml.tokens")
    count = len(tokens) if isinstance(tokens, list) else 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise CheckpointError(f"{path}: tokenizer.ggml.{name}_token_id is {value!r}, the number of none of its tokens")
    return value


class _Reader:
    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self.metadata = metadata

    def tokens(self) -> list[str]:
        """The vocabulary; an empty entry gets the name that llama.cpp gives it."""
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(self.sequence("tokenizer.ggml.tokens", str))]
        if len(set(tokens)) != len(tokens):
            raise self.error("tokenizer.ggml.tokens names a token twice")
        return tokens

    def types(self, count: int) -> list[int]:
        """What each token is: normal, control, user-defined, …"""
        types = self.sequence("tokenizer.ggml.token_type", int)
        if len(types) != count:
            raise self.error(f"there are {count:,} tokens, but tokenizer.ggml.token_type has {len(types):,} entries")
        return types

    def sequence(self, key: str, kind: type) -> list[Any]:
        value = self.metadata.get(key)
        if not isinstance(value, list) or (value and type(value[0]) is not kind):  # arrays have one type
            raise self.error(f"{key} is missing, or no list of {kind.__name__}")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise self.error(f"{key} is neither true nor false")
        return value

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")


def _added(read: _Reader, add: Mapping[str, bool], special: Mapping[str, int], which: str) -> int | None:
    if not add[f"add_{which}_token"]:
        return None
    if f"{which}_token" not in special:
        raise read.error(f"tokenizer.ggml.add_{which}_token is set, but there is no tokenizer.ggml.{which}_token_id")
    return special[f"{which}_token"]


def _end_ids(read: _Reader, tokens: list[str], types: list[int], template: str) -> list[int]:
    """Tokens that end a sequence: those that the file names, and those with which its chat template ends a turn."""
    named = [token_id(read.path, read.metadata, name) for name in ("eos", "eot", "eom")]
    control = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == _CONTROL}
    shown = [control[text] for text in _ENDS_OF_TURN if text in template and text in control]
    return list(dict.fromkeys([i for i in named if i is not None] + shown))


def _tokenizer(
    read: _Reader, pre: PreTokenizer, tokens: list[str], types: list[int], front: int | None, back: int | None
) -> Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in read.sequence("tokenizer.ggml.merges", str)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre.ignore_merges))
        tokenizer.decoder = decoders.ByteLevel()
        splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in pre.splits]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
        if pre.nfc:
            tokenizer.normalizer = normalizers.NFC()
        for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
            texts = [token for token, token_type in zip(tokens, types, strict=True) if token_type == kind]
            tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text in texts])
        if front is not None or back is not None:
            ends = [[] if i is None else [tokens[i]] for i in (front, back)]
            numbers = [(tokens[i], i) for i in dict.fromkeys((front, back)) if i is not None]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[*ends[0], "$A", *ends[1]], special_tokens=numbers
            )
    except Exception as error:  # tokenizers raises bare Exception
        raise read.error(f"its tokens, types and merges do not make a tokenizer: {error}") from error
    return tokenizer
