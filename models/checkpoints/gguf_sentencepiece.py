"""SentencePiece BPE (`tokenizer.ggml.model` is `llama`): Llama 2, Mistral, Gemma, Phi-3.

SentencePiece joins the two neighbours whose union is the piece of the highest score, until no union is a piece;
`tokenizers` applies merges by rank. So each way to cut a piece into two becomes a merge, ranked by the piece's score
(Kudo and Richardson 2018, arXiv:1808.06226; src/bpe_model.cc). Spaces are written `▁`, and characters without a piece
become their UTF-8 bytes.
"""

import math

from tokenizers import Regex, Tokenizer, decoders, models, normalizers

from .gguf_vocabulary import TokenType, Vocabulary

_SPACE = "\u2581"  # ▁
# What no vocabulary comes near: a lie must not cost more than these.
_LONGEST = 512  # characters of a piece
_CHARACTERS = 1 << 22  # of all pieces
_MERGES = 1 << 21


def sentencepiece_bpe(vocabulary: Vocabulary) -> Tokenizer:
    """Rebuild the tokenizer, without the added tokens.

    Raises:
        CheckpointError: scores are missing, not numbers or all the same; a piece is absurdly long; or there is text
            that no token stands for.
    """
    unknown = vocabulary.id("unknown")
    if unknown is None and len(vocabulary.of_type(TokenType.BYTE)) != 256:
        raise vocabulary.error("its tokenizer has neither an unknown token nor one for each byte")
    tokenizer = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(vocabulary.tokens)},
            _merges(vocabulary),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = vocabulary.boolean("add_space_prefix", True)
    steps: list[normalizers.Normalizer] = []
    if vocabulary.boolean("remove_extra_whitespaces", False):
        ends = Regex(rf"\A +|[ {_SPACE}]+\z")
        steps += [normalizers.Replace(ends, ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    undo: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if prefix else undo)
    return tokenizer


def _merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The file's own, if it has any; else those that the scores imply, of the highest score first."""
    if "tokenizer.ggml.merges" in vocabulary.metadata:
        return [(left, right) for left, _, right in (m.partition(" ") for m in vocabulary.sequence("merges", str))]
    scores = vocabulary.sequence("scores", float, int)
    if len(scores) != len(vocabulary.tokens) or not all(map(math.isfinite, scores)):
        raise vocabulary.error("tokenizer.ggml.scores must have one number for each token")
    pieces = vocabulary.of_type(TokenType.NORMAL)
    if max(map(len, pieces), default=0) > _LONGEST or sum(map(len, pieces)) > _CHARACTERS:
        raise vocabulary.error("its tokens are longer than any tokenizer's")
    ranked: list[tuple[float, str, str]] = []
    for piece, i in pieces.items():
        cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        ranked += [(scores[i], left, right) for left, right in cuts if left in pieces and right in pieces]
        if len(ranked) > _MERGES:
            raise vocabulary.error(f"its tokens merge in more than {_MERGES:,} ways, more than any tokenizer's")
    if len(ranked) > 1 and len({score for score, _, _ in ranked}) == 1:
        raise vocabulary.error(
            "all its tokens have the same score, so it does not say in which order they merge; "
            "convert the model again with its tokenizer.model"
        )
    ranked.sort(key=lambda merge: (-merge[0], -len(merge[1])))
    return [(left, right) for _, left, right in ranked]
