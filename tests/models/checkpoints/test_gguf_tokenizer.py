"""The tokenizer of a GGUF: text is cut as its `pre` says, special tokens stay whole, contradictions are refused."""

import json

import pytest
from checkpoint_files import MERGES, TEMPLATE, TOKENS, TYPES, metadata, write_model
from tokenizers import Tokenizer

from zonda import CheckpointError
from zonda.models.checkpoints import open_checkpoint
from zonda.models.checkpoints.gguf_pre_tokenizers import PRE_TOKENIZERS
from zonda.models.checkpoints.gguf_tokenizer import tokenizer_files


def files(tmp_path, **changes) -> dict[str, bytes]:
    changed = {f"tokenizer.{key.replace('__', '.')}": value for key, value in changes.items()}
    return tokenizer_files(tmp_path, {k: v for k, v in (metadata() | changed).items() if v is not None})


def tokenizer(tmp_path, **changes) -> Tokenizer:
    return Tokenizer.from_buffer(files(tmp_path, **changes)["tokenizer.json"])


def words(tmp_path, pre: str, text: str) -> list[str]:
    """The words of `text`, before any merge."""
    rebuilt = tokenizer(tmp_path, ggml__pre=pre)
    return [text[start:end] for _, (start, end) in rebuilt.pre_tokenizer.pre_tokenize_str(text)]


TEXT = "I'LL pay 12345€ x\n\n  y"
CUT = {
    "gpt-2": ["I", "'", "LL", " pay", " 12345", "€", " x", "\n\n ", " y"],
    "smollm": ["I", "'", "LL", " pay", " ", "1", "2", "3", "4", "5", "€", " x", "\n\n ", " y"],
    "llama-bpe": ["I", "'LL", " pay", " ", "123", "45", "€", " x", "\n\n", " ", " y"],
    "qwen2": ["I", "'LL", " pay", " ", "1", "2", "3", "4", "5", "€", " x", "\n\n", " ", " y"],
    "tekken": ["I", "'LL", " pay", " ", "1", "2", "3", "4", "5", "€", " x", "\n\n", " ", " y"],
    "gpt-4o": ["I'LL", " pay", " ", "123", "45", "€", " x", "\n\n", " ", " y"],
    "default": ["I", "'", "LL", " pay", " ", "123", "45", "€", " x", "\n\n ", " y"],
    "deepseek-v3": ["I", "'LL", " pay", " ", "123", "45", "€", " x", "\n\n", " ", " y"],
}


@pytest.mark.parametrize("pre", CUT)
def test_text_is_cut_as_the_pre_tokenizer_says(tmp_path, pre):
    assert words(tmp_path, pre, TEXT) == CUT[pre]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_gives_any_text_back(tmp_path, pre):
    text = "Ça: don't  stop\t你好 🌬️👨‍👩‍👧 ٣٤ x=1e-9;\r\n\r\n "
    rebuilt = tokenizer(tmp_path, ggml__pre=pre)
    assert rebuilt.decode(rebuilt.encode(text).ids) == text


def test_merges_apply_in_their_order(tmp_path):
    assert tokenizer(tmp_path).encode("hello w12").tokens == ["hello", "Ġw", "1", "2"]
    assert tokenizer(tmp_path, ggml__pre="gpt-2").encode("12").tokens == ["12"]


def test_a_word_that_is_a_token_stays_whole_where_merges_are_ignored(tmp_path):
    tokens = [*TOKENS, "zonda"]
    changes = {"ggml__tokens": tokens, "ggml__token_type": [*TYPES, *[1] * (len(tokens) - len(TYPES))]}
    assert tokenizer(tmp_path, **changes, ggml__pre="llama-bpe").encode("zonda").tokens == ["zonda"]
    assert tokenizer(tmp_path, **changes, ggml__pre="dbrx").encode("zonda").tokens == list("zonda")


def test_qwen_normalises_to_nfc_and_llama_does_not(tmp_path):
    assert tokenizer(tmp_path, ggml__pre="qwen2").encode("e\u0301").tokens == ["Ã", "©"]
    assert tokenizer(tmp_path, ggml__pre="llama-bpe", ggml__add_bos_token=False).encode("e\u0301").tokens[0] == "e"


def test_control_and_user_defined_tokens_stay_whole_and_only_control_tokens_are_skipped(tmp_path):
    rebuilt = tokenizer(tmp_path)
    encoded = rebuilt.encode("<|im_end|>hello<tool>")
    assert encoded.ids == [TOKENS.index(t) for t in ("<|im_end|>", "hello", "<tool>")]
    assert rebuilt.decode(encoded.ids) == "hello<tool>"
    assert rebuilt.decode(encoded.ids, skip_special_tokens=False) == "<|im_end|>hello<tool>"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ggml__pre": "smollm", "ggml__add_bos_token": None}, ["hello"]),
        ({"ggml__pre": "llama-bpe", "ggml__add_bos_token": None}, ["<|bos|>", "hello"]),
        ({"ggml__pre": "llama-bpe", "ggml__add_bos_token": False}, ["hello"]),
        ({"ggml__add_bos_token": True}, ["<|bos|>", "hello"]),
        ({"ggml__add_bos_token": True, "ggml__add_eos_token": True}, ["<|bos|>", "hello", "<|eos|>"]),
        ({"ggml__add_eos_token": True}, ["hello", "<|eos|>"]),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(tmp_path, changes, expected):
    assert tokenizer(tmp_path, **changes).encode("hello").tokens == expected
    assert tokenizer(tmp_path, **changes).encode("hello", add_special_tokens=False).tokens == ["hello"]


def test_the_other_files(tmp_path):
    written = files(tmp_path, ggml__padding_token_id=1, ggml__unknown_token_id=0xFFFFFFFF)
    assert written["chat_template.jinja"].decode() == TEMPLATE
    config = json.loads(written["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == ("<|bos|>", "<|eos|>", "<|eos|>")
    assert "unk_token" not in config
    assert json.loads(written["generation_config.json"])["bos_token_id"] == 0


@pytest.mark.parametrize(
    ("changes", "ends"),
    [
        ({}, ["<|eos|>", "<|im_end|>"]),
        ({"chat_template": "{{ messages }}"}, ["<|eos|>"]),
        ({"chat_template": None, "ggml__eot_token_id": 2}, ["<|eos|>", "<|im_end|>"]),
        ({"chat_template": None, "ggml__eom_token_id": 0, "ggml__eot_token_id": 1}, ["<|eos|>", "<|bos|>"]),
    ],
)
def test_a_sequence_ends_where_the_file_or_its_chat_template_says(tmp_path, changes, ends):
    ids = json.loads(files(tmp_path, **changes)["generation_config.json"])["eos_token_id"]
    assert [TOKENS[i] for i in ids] == ends


@pytest.mark.parametrize(("more", "ends"), [([], ["<|end|>"]), (["<|call|>"], ["<|return|>", "<|call|>"])])
def test_gpt_oss_ends_a_message_where_phi_3_ends_its_answer(tmp_path, more, ends):
    tokens = [*TOKENS, "<|end|>", "<|return|>", *more]
    types = [*TYPES, *[1] * (len(TOKENS) - len(TYPES)), *[3] * (2 + len(more))]
    template = "<|end|><|return|><|call|>"
    changes = {"ggml__tokens": tokens, "ggml__token_type": types, "chat_template": template, "ggml__eos_token_id": None}
    written = files(tmp_path, **changes)
    ids = json.loads(written["generation_config.json"])["eos_token_id"]
    assert [tokens[i] for i in ids] == ends


def test_a_byte_level_vocabulary_strips_no_white_space(tmp_path):
    """Phi-4, whose files are of Phi-3's architecture; llama.cpp strips for Phi-3 alone."""
    assert tokenizer_files(tmp_path, metadata(), rstrip=True) == tokenizer_files(tmp_path, metadata())


def test_an_empty_entry_of_the_vocabulary_gets_llama_cpps_name(tmp_path):
    tokens = [*TOKENS, ""]
    changes = {"ggml__tokens": tokens, "ggml__token_type": [*TYPES, *[1] * (len(tokens) - len(TYPES))]}
    assert tokenizer(tmp_path, **changes).id_to_token(len(TOKENS)) == f"[EMPTY_{len(TOKENS)}]"


def test_the_files_are_the_same_every_time(tmp_path):
    assert files(tmp_path, ggml__add_bos_token=True) == files(tmp_path, ggml__add_bos_token=True)


REFUSED = {
    "no tokenizer": ({"ggml__model": None}, "kind None"),
    "unigram": ({"ggml__model": "t5"}, "kind 't5'"),
    "no pre-tokenizer": ({"ggml__pre": None}, "pre-tokenizer None"),
    "unknown pre-tokenizer": ({"ggml__pre": "zonda"}, "'zonda'.*known: .*gpt-2.*llama-bpe"),
    "no tokens": ({"ggml__tokens": None}, "tokens is missing"),
    "tokens that are numbers": ({"ggml__tokens": [1, 2, 3]}, "no list of str"),
    "no types": ({"ggml__token_type": None}, "token_type is missing"),
    "too few types": ({"ggml__token_type": TYPES}, "tokens, but tokenizer.ggml.token_type has 4"),
    "token twice": ({"ggml__tokens": [*TOKENS[:-1], "h"]}, "a token twice"),
    "no merges": ({"ggml__merges": None}, "merges is missing"),
    "merge of one": ({"ggml__merges": ["hello"]}, "do not make a tokenizer"),
    "merge of unknown tokens": ({"ggml__merges": [*MERGES, "q q"]}, "do not make a tokenizer"),
    "bos beyond the vocabulary": ({"ggml__bos_token_id": 10**6}, "bos_token_id is 1000000"),
    "eos as text": ({"ggml__eos_token_id": "x"}, "eos_token_id is 'x'"),
    "bos to add, but none": ({"ggml__add_bos_token": True, "ggml__bos_token_id": None}, "add_bos_token is set"),
    "a number for a boolean": ({"ggml__add_bos_token": 1}, "neither true nor false"),
    "a template that is a list": ({"chat_template": ["x"]}, "chat_template is no text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_contradicts_itself(tmp_path, name):
    changes, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=message) as caught:
        files(tmp_path, **changes)
    assert str(tmp_path) in str(caught.value)


def test_a_checkpoint_carries_these_files(tmp_path):
    checkpoint = open_checkpoint(write_model(tmp_path / "m.gguf"))
    assert checkpoint.files == files(tmp_path)
