"""The tokenizer in a GGUF's metadata, rebuilt as the files that an HF checkpoint has."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from ... import ZondaError
from .gguf_byte_level import byte_level_bpe
from .gguf_sentencepiece import sentencepiece_bpe
from .gguf_vocabulary import TokenType, Vocabulary

_HF_NAMES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_ENDS_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
"""Control tokens that end an answer, where the chat template says so; files often name only the end of a document."""
_ENDS_OF_HARMONY = ("<|return|>", "<|call|>")
"""Those of GPT-OSS, whose `<|end|>` ends a message, after which the answer goes on."""


def tokenizer_files(path: Path, metadata: Mapping[str, Any], *, rstrip: bool = False) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json, generation_config.json and chat_template.jinja from metadata.

    Args:
        path: for messages.
        metadata: of the whole file.
        rstrip: of `GgufLayout`.

    Raises:
        CheckpointError: no tokenizer, one of a kind that is not supported, or one that contradicts itself.
    """
    vocabulary = Vocabulary(path, metadata)
    special = {hf: i for gguf, hf in _HF_NAMES.items() if (i := vocabulary.id(gguf)) is not None}
    template = metadata.get("tokenizer.chat_template", "")
    if not isinstance(template, str):
        raise vocabulary.error("tokenizer.chat_template is no text")
    try:
        tokenizer, add_bos = _model(vocabulary)
        tokenizer.add_tokens(_added_tokens(vocabulary, special, rstrip))
        add = {
            f"add_{which}_token": vocabulary.boolean(f"add_{which}_token", default)
            for which, default in (("bos", add_bos and "bos_token" in special), ("eos", False))
        }
        _add_ends(tokenizer, vocabulary, add, special)
        rebuilt = tokenizer.to_str(pretty=False).encode()
    except ZondaError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise vocabulary.error(f"its tokens, types and merges do not make a tokenizer: {error}") from error
    config: dict[str, Any] = {hf: vocabulary.tokens[i] for hf, i in special.items()} | add
    config |= {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    generation: dict[str, Any] = {f"{hf}_id": special[hf] for hf in ("bos_token", "pad_token") if hf in special}
    generation["eos_token_id"] = _end_ids(vocabulary, template)
    files = {
        "tokenizer.json": rebuilt,
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
        "generation_config.json": json.dumps(generation, indent=2).encode(),
    }
    if template:
        files["chat_template.jinja"] = template.encode()
    return files


def _model(vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    """The tokenizer without added tokens, and whether it puts BOS in front when the file does not say."""
    kind = vocabulary.metadata.get("tokenizer.ggml.model")
    if kind == "llama":
        return sentencepiece_bpe(vocabulary), True
    if kind == "gpt2":
        return byte_level_bpe(vocabulary)
    raise vocabulary.error(
        f"its tokenizer is of the kind {kind!r}; byte-level BPE ('gpt2') and SentencePiece BPE ('llama') are supported"
    )


def _added_tokens(vocabulary: Vocabulary, special: Mapping[str, int], rstrip: bool) -> list[AddedToken]:
    """Those that are found in text before anything else; control tokens are left out when ids are decoded.

    SentencePiece finds user-defined ones in the text with its spaces already written `▁`. Here that can be had where
    no space is put in front, which would be put in front of the tokens as well.
    """
    sentencepiece = vocabulary.metadata.get("tokenizer.ggml.model") == "llama"
    normalized = sentencepiece and not vocabulary.boolean("add_space_prefix", True)
    keeps = {special[name] for name in ("bos_token", "unk_token", "pad_token") if name in special}
    control = vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN)
    others = vocabulary.of_type(TokenType.USER_DEFINED)
    return [
        AddedToken(
            text,
            special=text in control,
            normalized=normalized and text not in control,
            rstrip=rstrip and sentencepiece and i not in keeps,
        )
        for text, i in (control | others).items()
    ]


def _add_ends(
    tokenizer: Tokenizer, vocabulary: Vocabulary, add: Mapping[str, bool], special: Mapping[str, int]
) -> None:
    """Let the tokenizer put BOS in front of a text, and EOS behind it, as the file says."""
    ends: list[list[int]] = []
    for which in ("bos", "eos"):
        wanted = add[f"add_{which}_token"]
        if wanted and f"{which}_token" not in special:
            key = f"tokenizer.ggml.add_{which}_token"
            raise vocabulary.error(f"{key} is set, but there is no tokenizer.ggml.{which}_token_id")
        ends.append([special[f"{which}_token"]] if wanted else [])
    front, back = ([vocabulary.tokens[i] for i in end] for end in ends)
    if front or back:
        numbers = [(vocabulary.tokens[i], i) for i in dict.fromkeys(ends[0] + ends[1])]
        tokenizer.post_processor = processors.TemplateProcessing(single=[*front, "$A", *back], special_tokens=numbers)


def _end_ids(vocabulary: Vocabulary, template: str) -> list[int]:
    """Tokens that end a sequence: those that the file names, and those with which its chat template ends a turn."""
    named = [vocabulary.id(name) for name in ("eos", "eot", "eom")]
    control = vocabulary.of_type(TokenType.CONTROL)
    ends: Sequence[str] = _ENDS_OF_TURN
    if all(text in control for text in _ENDS_OF_HARMONY):
        ends = _ENDS_OF_HARMONY
    shown = [control[text] for text in ends if text in template and text in control]
    return list(dict.fromkeys([i for i in named if i is not None] + shown))
