"""Byte-level BPE (`tokenizer.ggml.model` is `gpt2`): Llama 3, Qwen, Phi-4, StarCoder, GPT-OSS and most others."""

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from .gguf_pre_tokenizers import PRE_TOKENIZERS
from .gguf_vocabulary import Vocabulary


def byte_level_bpe(vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    """Rebuild the tokenizer, without the added tokens; and say whether it puts BOS in front if the file does not.

    Raises:
        CheckpointError: an unknown pre-tokenizer, or no merges.
    """
    name = vocabulary.metadata.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise vocabulary.error(f"its pre-tokenizer {name!r} (tokenizer.ggml.pre) is not supported; known: {known}")
    pre = PRE_TOKENIZERS[name]
    merges = [tuple(merge.split(" ", 1)) for merge in vocabulary.sequence("merges", str)]
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=pre.ignore_merges))
    tokenizer.decoder = decoders.ByteLevel()
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in pre.splits]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer, pre.add_bos
