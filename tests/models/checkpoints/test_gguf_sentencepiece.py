"""SentencePiece BPE from a GGUF gives the ids of SentencePiece itself, on every text of the corpus."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import gguf
import pytest
from checkpoint_files import add_value, finish
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_corpus import SPACES, corpus
from tokenizers import Tokenizer

from zonda import CheckpointError
from zonda.models.checkpoints.gguf_reader import read_gguf
from zonda.models.checkpoints.gguf_tokenizer import tokenizer_files

sentencepiece = pytest.importorskip("sentencepiece")

CONTROL = ["[INST]", "<|end|>"]
USER_DEFINED = ["<start>", "\n", "\n\n", "\t\t", *("▁" * n for n in range(2, 32)), "<b>", "</b>"]


@dataclass
class Kind:
    """How a family's tokenizer.model was trained; `prefix` and `squeeze` as a GGUF says it."""

    prefix: bool = True
    squeeze: bool = False
    options: dict = field(default_factory=dict)


KINDS = {
    "Llama 2 and Mistral": Kind(),
    "whole digits": Kind(options={"split_digits": False}),
    "long pieces": Kind(options={"split_by_whitespace": False, "max_sentencepiece_length": 32}),
    "Gemma": Kind(prefix=False, options={"user_defined_symbols": USER_DEFINED}),
    "no prefix": Kind(prefix=False),
    "extra white space removed": Kind(squeeze=True),
    "no bytes": Kind(options={"byte_fallback": False, "character_coverage": 0.98}),
}


def train(kind: Kind):
    model = io.BytesIO()
    options = {
        "model_type": "bpe",
        "vocab_size": 1400,
        "byte_fallback": True,
        "character_coverage": 0.995,
        "normalization_rule_name": "identity",
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "max_sentence_length": 1 << 20,
        "control_symbols": CONTROL,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in corpus() for line in text.split("\n") if "\0" not in line),
        model_writer=model,
        add_dummy_prefix=kind.prefix,
        remove_extra_whitespaces=kind.squeeze,
        minloglevel=2,
        **options | kind.options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def vocabulary(processor, user_defined: Sequence[str] = ()) -> dict[str, list]:
    """As `_create_vocab_sentencepiece` of llama.cpp's converter."""
    tokens, scores, types = [], [], []
    for i in range(processor.GetPieceSize()):
        piece, score, kind = processor.IdToPiece(i), processor.GetScore(i), gguf.TokenType.NORMAL
        if processor.IsUnknown(i):
            kind = gguf.TokenType.UNKNOWN
        elif processor.IsControl(i):
            kind = gguf.TokenType.CONTROL
        elif processor.IsByte(i):
            kind = gguf.TokenType.BYTE
        elif piece in user_defined:  # as tokenizer_config.json has them
            piece, score, kind = piece.replace("▁", " "), -1000.0, gguf.TokenType.USER_DEFINED
        tokens.append(piece)
        scores.append(score)
        types.append(int(kind))
    tokens += [f"[PAD{i}]" for i in range(5)]
    return {"tokens": tokens, "scores": scores + [-10000.0] * 5, "token_type": types + [5] * 5}


LLAMA = KINDS["Llama 2 and Mistral"]


def to_gguf(path, processor, kind: Kind = LLAMA, **changes):
    writer = gguf.GGUFWriter(path, "llama")
    values = {"model": "llama", "pre": "default", "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    values |= {} if kind.prefix else {"add_space_prefix": False}
    values |= {"remove_extra_whitespaces": True} if kind.squeeze else {}
    tokens = vocabulary(processor, kind.options.get("user_defined_symbols", ()))
    for key, value in (tokens | values | changes).items():
        if value is not None:
            add_value(writer, f"tokenizer.ggml.{key}", value)
    finish(writer)
    return path


def rebuild(path, *, rstrip: bool = False) -> Tokenizer:
    return Tokenizer.from_buffer(tokenizer_files(path, read_gguf(path).metadata, rstrip=rstrip)["tokenizer.json"])


@pytest.fixture(scope="module")
def llama():
    return train(LLAMA)


@pytest.mark.parametrize("name", KINDS)
def test_every_text_has_the_ids_of_sentencepiece_and_comes_back(name, tmp_path):
    kind = KINDS[name]
    processor = train(kind)
    rebuilt = rebuild(to_gguf(tmp_path / "t.gguf", processor, kind))
    count = 0
    for text in corpus(*(USER_DEFINED if name == "Gemma" else ())):
        if any(special in text for special in ("<unk>", "<s>", "</s>", *CONTROL)):
            continue  # which SentencePiece takes for text; see below
        wanted = processor.Encode(text)
        assert rebuilt.encode(text, add_special_tokens=False).ids == wanted, text
        assert rebuilt.encode(text).ids == [1, *wanted]
        if processor.unk_id() not in wanted:
            found = rebuilt.decode(wanted)
            if kind.squeeze:
                assert found.lstrip(" ") == processor.Decode(wanted)
            else:
                assert found == processor.Decode(wanted) == text.replace("▁", " ")
        count += len(wanted)
    assert count < 0.6 * sum(len(text.encode()) for text in corpus())


def test_control_tokens_stay_whole_and_the_text_between_them_begins_anew(llama, tmp_path):
    """As llama.cpp has it, and the tokenizer.json of Llama 2: each stretch of text gets its space in front."""
    rebuilt = rebuild(to_gguf(tmp_path / "t.gguf", llama))
    ids = {text: llama.PieceToId(text) for text in ("<s>", "</s>", "<unk>", *CONTROL)}
    for first, second in zip(ids, [*ids][1:], strict=False):
        for left, middle, right in (("a b", " c", "d"), ("", "", ""), ("é\n", "世界", "  "), ("x ", " ", "<0x41>")):
            wanted = [*llama.Encode(left), ids[first], *llama.Encode(middle), ids[second], *llama.Encode(right)]
            text = left + first + middle + second + right
            assert rebuilt.encode(text, add_special_tokens=False).ids == wanted, text
    assert rebuilt.decode(rebuilt.encode("a<s>b").ids) == "a b"
    assert rebuilt.decode(rebuilt.encode("a<s>b").ids, skip_special_tokens=False) == "<s> a<s> b"


def test_bytes_are_text_only_as_tokens(llama, tmp_path):
    rebuilt = rebuild(to_gguf(tmp_path / "t.gguf", llama))
    smile = rebuilt.encode("\U0001faf5", add_special_tokens=False).tokens
    assert smile == ["▁", "<0xF0>", "<0x9F>", "<0xAB>", "<0xB5>"]
    assert "<0x41>" not in rebuilt.encode("<0x41>").tokens


@pytest.mark.parametrize(
    ("changes", "ends"),
    [
        ({}, ([1], [])),
        ({"add_bos_token": False}, ([], [])),
        ({"add_bos_token": True, "add_eos_token": True}, ([1], [2])),
        ({"bos_token_id": None, "eos_token_id": None, "unknown_token_id": None}, ([1], [])),  # of old files
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(llama, tmp_path, changes, ends):
    rebuilt = rebuild(to_gguf(tmp_path / "t.gguf", llama, **changes))
    assert rebuilt.encode("hello").ids == [*ends[0], *llama.Encode("hello"), *ends[1]]


def test_white_space_behind_special_tokens_goes_where_the_family_strips_it(llama, tmp_path):
    path = to_gguf(tmp_path / "t.gguf", llama, padding_token_id=llama.PieceToId("[INST]"))
    kept, stripped = rebuild(path), rebuild(path, rstrip=True)
    for space in filter(str.isspace, SPACES):
        for token, strips in (("<|end|>", True), ("</s>", True), ("<s>", False), ("<unk>", False), ("[INST]", False)):
            text = f"{token}{space}x"
            assert stripped.encode(text).ids == kept.encode(f"{token}x" if strips else text).ids, text


def test_merges_of_the_file_go_before_those_of_the_scores(llama, tmp_path):
    tokens = vocabulary(llama)["tokens"]
    pair = next(t for t in tokens if len(t) == 2 and t.isascii() and t[0] in tokens and t[1] in tokens)
    rebuilt = rebuild(to_gguf(tmp_path / "t.gguf", llama, merges=[" ".join(pair)], scores=None))
    assert rebuilt.encode(pair * 2, add_special_tokens=False).tokens == ["▁", pair, pair]


NAN = float("nan")
REFUSED = {
    "no scores": ({"scores": None}, "scores is missing"),
    "scores that are texts": ({"scores": ["1"]}, "no list of float or int"),
    "too few scores": ({"scores": [1.0, 2.0]}, "one number for each token"),
    "a score that is no number": (lambda v: {"scores": [NAN, *v["scores"][1:]]}, "one number for each token"),
    "equal scores": (lambda v: {"scores": [-1000.0] * len(v["tokens"])}, "same score.*with its tokenizer.model"),
    "a token of a thousand characters": (
        lambda v: {"tokens": ["x" * 1000 if t == v["tokens"][-6] else t for t in v["tokens"]]},
        "longer than any tokenizer's",
    ),
    "a token twice": (lambda v: {"tokens": [*v["tokens"][:-1], "<s>"]}, "a token twice"),
    "no unknown token, few bytes": (
        lambda v: {"unknown_token_id": 0xFFFFFFFF, "token_type": [1 if t == 6 else t for t in v["token_type"]]},
        "neither an unknown token",
    ),
    "unknown beyond the vocabulary": ({"unknown_token_id": 10**6}, "unknown_token_id is 1000000"),
    "a prefix that is a number": ({"add_space_prefix": 1}, "add_space_prefix is neither true nor false"),
    "merges of unknown tokens": ({"merges": ["qqq qqq"]}, "do not make a tokenizer"),
    "a merge of one": ({"merges": ["qqq"]}, "do not make a tokenizer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_contradicts_itself(llama, tmp_path, name):
    changes, message = REFUSED[name]
    changes = changes(vocabulary(llama)) if callable(changes) else changes
    path = to_gguf(tmp_path / "t.gguf", llama, **changes)
    with pytest.raises(CheckpointError, match=message):
        rebuild(path)


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ([f"{a:05}{'x' * 500}" for a in range(10_000)], "longer than any tokenizer's"),
        (
            [
                "".join("ab"[i >> bit & 1] for bit in range(length))
                for length in range(1, 18)
                for i in range(min(1 << length, 1 << 16))
            ],
            "merge in more than 2,097,152 ways",
        ),
    ],
    ids=["5 million characters", "2 million ways to merge"],
)
def test_a_vocabulary_that_would_cost_minutes_is_refused(tmp_path, pieces, words):
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *pieces]}
    metadata |= {"tokenizer.ggml.token_type": [2, 3, 3, *[1] * len(pieces)]}
    metadata |= {"tokenizer.ggml.scores": [float(-i) for i in range(len(pieces) + 3)]}
    with pytest.raises(CheckpointError, match=words):
        tokenizer_files(tmp_path, metadata)


TEXT = st.text(st.sampled_from("ab▁ \n<é"), max_size=4)
NUMBER = st.one_of(st.floats(width=32), st.integers(-9, 9).map(float))


@settings(
    max_examples=150, deadline=5000, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), tokens=st.lists(st.one_of(TEXT, st.sampled_from(["<s>", "<0x0A>", "<unk>"])), max_size=12))
def test_any_vocabulary_is_a_checkpoint_error_or_encodes_any_text(tmp_path, data, tokens):
    count = data.draw(st.sampled_from([len(tokens)] * 4 + [len(tokens) + 1]))
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": data.draw(st.lists(NUMBER, min_size=count, max_size=count)),
        "tokenizer.ggml.token_type": data.draw(st.lists(st.integers(0, 7), min_size=count, max_size=count)),
        "tokenizer.ggml.bos_token_id": data.draw(st.sampled_from([0, 1, 2, 0xFFFFFFFF])),
        "tokenizer.ggml.eos_token_id": 0xFFFFFFFF,
        "tokenizer.ggml.unknown_token_id": data.draw(st.sampled_from([0, 1, 0xFFFFFFFF])),
        "tokenizer.ggml.add_space_prefix": data.draw(st.booleans()),
    }
    try:
        rebuilt = Tokenizer.from_buffer(tokenizer_files(tmp_path, metadata)["tokenizer.json"])
    except CheckpointError:
        return
    for text in ("", "ab  ba\n<s>é", "▁ a<unk>"):
        rebuilt.decode(rebuilt.encode(text).ids)
