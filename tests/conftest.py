"""Fixtures that several rooms share: a tiny checkpoint folder, the bundle built from it, and SmolLM2 if it is there."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support import randomise
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from zonda.build_engine import BuildOptions, build_bundle

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CORPUS = ["the wind comes down from the mountains", "hot and dry wind", "def f(x): return x + 1", "¿qué día? 你好 🌬️"]


def tiny_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<|start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer


def write_folder(folder: Path, **changes) -> Path:
    """An HF folder of a tiny random Llama with its own tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    config = transformers.LlamaConfig(vocab_size=tokenizer.get_vocab_size(), **TINY | changes)
    model = transformers.LlamaForCausalLM(config)
    randomise(model)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors")
    values = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(values))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|end|>", "chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return folder


def build_quietly(model: Path | str, output: Path, **options) -> Path:
    from rich.console import Console

    path = build_bundle(str(model), output, BuildOptions(**options), Console(quiet=True))
    assert path is not None
    return path


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory) -> Iterator[None]:
    """What `zonda verify` remembers on this host neither reaches the tests nor comes from them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory, tiny_folder) -> Path:
    return build_quietly(tiny_folder, tmp_path_factory.mktemp("bundle") / "tiny", max_batch=4, max_chunk=16)


@pytest.fixture(scope="session")
def tiny_reference(tiny_folder):
    """The transformers model of `tiny_folder`, and greedy continuation of token ids by it, without a cache."""
    model = transformers.LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()

    def greedy(ids: list[int], count: int) -> list[int]:
        out = list(ids)
        with torch.no_grad():
            for _ in range(count):
                out.append(int(model(torch.tensor([out])).logits[0, -1].argmax()))
        return out[len(ids) :]

    return model, greedy


@pytest.fixture(scope="session")
def smollm2_gguf(request) -> Path:
    path = request.config.rootpath / "out/models/SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        pytest.skip(f"{path} is not there; `make test` fetches it")
    return path


@pytest.fixture(scope="session")
def smollm2_bundle(request, smollm2_gguf, tmp_path_factory) -> Path:
    return build_quietly(smollm2_gguf, tmp_path_factory.mktemp("bundle") / "smollm2")


@pytest.fixture(scope="session")
def smollm2_exact(smollm2_gguf, tmp_path_factory) -> Path:
    """The same in float32."""
    return build_quietly(smollm2_gguf, tmp_path_factory.mktemp("exact") / "smollm2", quality="exact")
