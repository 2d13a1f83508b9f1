r"""How byte-level BPE vocabularies cut text into words, by the name in a GGUF's `tokenizer.ggml.pre`.

The expressions are those of the models' own tokenizer.json files; names, `ignore_merges` and `add_bos` are those of
llama.cpp's `src/llama-vocab.cpp`, which defines the key. Every expression cuts the pieces that the ones before it
left, and what it does not match stays a piece. NFC is set where transformers' tokenizer class of the family sets it.
"""

from dataclasses import dataclass

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+SUFFIX"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*SUFFIX"
    r"|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = _CASED.replace("SUFFIX", "").replace("DIGITS", r"\p{N}")
_GPT4O = _CASED.replace("SUFFIX", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace("DIGITS", r"\p{N}{1,3}")
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """splits: regular expressions, applied one after the other.

    ignore_merges: a word that is a token stays whole, whatever the merges say. add_bos: when the file does not say.
    nfc: text is normalised to NFC first.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


def _named(names: str, pre_tokenizer: PreTokenizer) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names.split(), pre_tokenizer)


PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    **_named("default", PreTokenizer(_DEFAULT)),
    **_named("gpt-2 phi-2 jais exaone4 mellum gigachat a.x-4.0 trillion granite-docling", PreTokenizer((_GPT2,))),
    **_named("mpt olmo", PreTokenizer((_GPT2,), nfc=True)),
    **_named("smollm starcoder refact codeshell exaone minerva-7b mellum2", PreTokenizer((r"\p{N}", _GPT2))),
    **_named("command-r", PreTokenizer((r"\p{N}", _GPT2), nfc=True)),
    **_named(
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    **_named("dbrx smaug-bpe glm4 chatglm-bpe", PreTokenizer((_LLAMA3,))),
    **_named("qwen2", PreTokenizer((_QWEN2,), nfc=True)),
    **_named("deepseek-r1-qwen stablelm2 megrez hunyuan solar-open kormo", PreTokenizer((_QWEN2,))),
    **_named("qwen35", PreTokenizer((_QWEN35,), nfc=True)),
    **_named("tekken", PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True)),
    **_named("gpt-4o llama4 kanana2 minimax-m2", PreTokenizer((_GPT4O,))),
    **_named("deepseek-coder", PreTokenizer(_DEEPSEEK_CODER)),
    **_named("deepseek-v3 hunyuan-dense", PreTokenizer(_DEEPSEEK_V3)),
}
