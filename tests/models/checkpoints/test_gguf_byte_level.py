"""Byte-level BPE from a GGUF gives the ids of the tokenizer that it was made of, on every text of the corpus.

No hub is reachable, so the originals are trained here; what cuts and normalises text is what each family's
tokenizer.json has, or the class of transformers.
"""

from collections.abc import Callable

import gguf
import pytest
from checkpoint_files import add_value, finish
from tokenizer_corpus import corpus
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPT2Tokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from zonda.models.checkpoints.gguf_pre_tokenizers import PRE_TOKENIZERS
from zonda.models.checkpoints.gguf_reader import read_gguf
from zonda.models.checkpoints.gguf_tokenizer import tokenizer_files

SPECIAL = ["<|begin|>", "<|im_end|>", "<｜end▁of▁sentence｜>"]
USER_DEFINED = ["<tool>", "        ", "\n\n\n\n", "naïve"]
WHOLE = "zondawind"  # a token that no merges lead to
TEXTS = corpus(*SPECIAL, *USER_DEFINED)


def byte_level(*steps: pre_tokenizers.PreTokenizer, use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)])


def split(*expressions: str, behavior: str = "isolated", invert: bool = False) -> pre_tokenizers.PreTokenizer:
    cuts = [pre_tokenizers.Split(Regex(expression), behavior, invert) for expression in expressions]
    return byte_level(*cuts, use_regex=False)


DIGITS = pre_tokenizers.Digits(individual_digits=True)
CL100K = TikTokenConverter("").pattern
QWEN = Qwen2Tokenizer().backend_tokenizer
ORIGINALS: dict[str, Callable[[], tuple[normalizers.Normalizer | None, pre_tokenizers.PreTokenizer]]] = {
    "gpt-2": lambda: (None, GPT2Tokenizer().backend_tokenizer.pre_tokenizer),
    "phi-2": lambda: (None, byte_level(use_regex=True)),
    "olmo": lambda: (normalizers.NFC(), byte_level(use_regex=True)),
    "starcoder": lambda: (None, byte_level(DIGITS, use_regex=True)),
    "smollm": lambda: (None, byte_level(DIGITS, use_regex=True)),
    "refact": lambda: (None, byte_level(DIGITS, use_regex=True)),
    "command-r": lambda: (normalizers.NFC(), byte_level(DIGITS, use_regex=True)),
    "llama-bpe": lambda: (None, split(CL100K)),
    "dbrx": lambda: (None, split(CL100K, behavior="removed", invert=True)),
    "smaug-bpe": lambda: (None, split(CL100K)),
    "qwen2": lambda: (QWEN.normalizer, QWEN.pre_tokenizer),
    "deepseek-r1-qwen": lambda: (None, QWEN.pre_tokenizer),
    "stablelm2": lambda: (None, split(CL100K.replace("{1,3}", ""), behavior="removed", invert=True)),
    "qwen35": lambda: (normalizers.NFC(), split(GGUF_PRE_TOKENIZER_SPLITS["qwen35"])),
    "tekken": lambda: (None, split(GGUF_PRE_TOKENIZER_SPLITS["tekken"])),
    "gpt-4o": lambda: (None, split(GGUF_PRE_TOKENIZER_SPLITS["gpt-4o"])),
    "deepseek-coder": lambda: (
        None,
        byte_level(
            *(pre_tokenizers.Split(Regex(e), "isolated") for e in (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+")),
            pre_tokenizers.Split(Regex("[一-龥ࠀ-一가-퟿]+"), "isolated"),
            DIGITS,
            use_regex=False,
        ),
    ),
    "deepseek-v3": lambda: (
        None,
        split(
            r"\p{N}{1,3}",
            "[一-龥぀-ゟ゠-ヿ]+",
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
            r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
        ),
    ),
}
SAME = {
    "gpt-2": "jais exaone4 mellum gigachat a.x-4.0 trillion granite-docling",
    "olmo": "mpt",
    "starcoder": "codeshell exaone minerva-7b mellum2",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    "dbrx": "glm4 chatglm-bpe",
    "stablelm2": "megrez hunyuan solar-open kormo",
    "gpt-4o": "llama4 kanana2 minimax-m2",
    "deepseek-v3": "hunyuan-dense",
}
"""Names that llama.cpp treats alike."""


def train(name: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=name in ("llama-bpe", "tekken")))
    normalizer, tokenizer.pre_tokenizer = ORIGINALS[name]()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    # the trainer knows no token without merges
    state = tokenizer.to_str().replace('"vocab":{', f'"vocab":{{"{WHOLE}":{tokenizer.get_vocab_size()},', 1)
    tokenizer = Tokenizer.from_str(state)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in USER_DEFINED])
    return tokenizer


def to_gguf(path, tokenizer: Tokenizer, pre: str, **values):
    """As `_set_vocab_gpt2` of llama.cpp's converter."""
    import json

    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    added = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED, None: gguf.TokenType.NORMAL}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([kinds[added.get(token)] for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]])
    writer.add_add_bos_token(False)
    for key, value in values.items():
        add_value(writer, f"tokenizer.ggml.{key}", value)
    finish(writer)
    return path


def rebuild(path) -> Tokenizer:
    return Tokenizer.from_buffer(tokenizer_files(path, read_gguf(path).metadata)["tokenizer.json"])


@pytest.mark.parametrize("name", ORIGINALS)
def test_every_text_has_the_ids_of_the_original_and_comes_back(name, tmp_path):
    original = train(name)
    rebuilt = rebuild(to_gguf(tmp_path / "t.gguf", original, name))
    for text in [*TEXTS, WHOLE, f"a {WHOLE}s"]:
        wanted = original.encode(text).ids
        assert rebuilt.encode(text).ids == wanted, text
        for skip in (True, False):
            assert rebuilt.decode(wanted, skip_special_tokens=skip) == original.decode(wanted, skip_special_tokens=skip)
    merged = sum(len(original.encode(text).ids) for text in TEXTS)
    assert merged < 0.6 * sum(len(text.encode()) for text in TEXTS)  # or the merges would not be tested


def test_names_that_llama_cpp_treats_alike_are_alike():
    for name, others in SAME.items():
        assert {PRE_TOKENIZERS[other] for other in others.split()} == {PRE_TOKENIZERS[name]}


def test_every_pre_tokenizer_is_tested():
    tested = {*ORIGINALS, *" ".join(SAME.values()).split()}
    assert set(PRE_TOKENIZERS) - tested == {"default"}  # llama.cpp's own, of no model
