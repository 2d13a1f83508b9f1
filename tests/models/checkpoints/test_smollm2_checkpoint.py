"""SmolLM2-135M-Instruct from its Q4_1 GGUF: the same tensors as transformers reads, and its own tokenizer's ids."""

import json

import pytest
import torch
from tokenizers import Tokenizer

from zonda.models.checkpoints import open_checkpoint

TEXTS = [
    "The capital of France is",
    "don't I'll WE'VE rock'n'roll $100 €50 a_b-c.d/e\\f|g~h`i^j",
    " two  spaces   three \n\n\n\ttabs\r\n\r\nmixed \n x ",
    "def f(x):\n    return x**2  # square\n\n\tif x != 0:\n\t\tprint(f'{x:>10.3f}')",
    "Zażółć gęślą jaźń, Привет, как дела? Ελληνικά Türkçe İıŞş",
    "你好，世界！ こんにちは 안녕하세요 مرحبا שלום नमस्ते สวัสดี",
    "👍🏽 👨‍👩‍👧‍👦 🇫🇷 cafe\u0301 \u00a0\u2003\u3000\u200b\ufeff",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<|im_start text<|endoftext|>",
    "a" * 300 + " " * 50 + "\n" * 20 + "\x00\x7f\U0010ffff",
]
DIGITS = {
    # what llama.cpp's own tokenizer gives (/tokenize of xllamacpp 2026.10.11549 on this file)
    "year 2024, 1,000": [3610, 216, 34, 32, 34, 36, 28, 216, 33, 28, 32, 32, 32],
    "x12 345": [104, 33, 34, 216, 35, 36, 37],
    "\n\n6 ½Ⅷ": [1116, 38, 216, 16738, 173, 223, 117],
}


@pytest.fixture(scope="module")
def checkpoint(smollm2_gguf):
    return open_checkpoint(smollm2_gguf)


@pytest.fixture(scope="module")
def tokenizer(checkpoint) -> Tokenizer:
    return Tokenizer.from_buffer(checkpoint.files["tokenizer.json"])


def test_what_it_is(checkpoint):
    assert checkpoint.source.format == "GGUF Q4_1"
    assert len(checkpoint.tensors) == 272
    assert checkpoint.config["tie_word_embeddings"] is True
    assert checkpoint.config["rms_norm_eps"] == 1e-5
    assert json.loads(checkpoint.files["generation_config.json"])["eos_token_id"] == [2]
    assert checkpoint.files["chat_template.jinja"].startswith(b"{% for message in messages %}")


@pytest.mark.parametrize("text", DIGITS)
def test_digits_are_split_one_by_one(tokenizer, text):
    assert tokenizer.encode(text).ids == DIGITS[text]


def test_text_without_digits_has_the_ids_of_transformers(tokenizer, smollm2_gguf):
    """transformers does not know how `smollm` splits digits; on everything else it must agree."""
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    for text in TEXTS:
        expected = reference("".join(c for c in text if not c.isdigit()))["input_ids"]
        assert tokenizer.encode("".join(c for c in text if not c.isdigit())).ids == expected


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_every_quantised_tensor_is_held_in_blocks_without_loss(checkpoint):
    held = {name for name, info in checkpoint.tensors.items() if info.form is not None}
    assert len(held) == 211
    for name in held:
        assert torch.equal(checkpoint.blocks(name).dequantize(), checkpoint.load(name)), name


@pytest.mark.slow
def test_every_tensor_is_bit_equal_to_what_transformers_dequantises(checkpoint, smollm2_gguf):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent,
        gguf_file=smollm2_gguf.name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    reference = model.state_dict()
    assert set(reference) - set(checkpoint.tensors) == {"lm_head.weight"}
    for name in checkpoint.tensors:
        assert torch.equal(checkpoint.load(name), reference[name]), name
