"""SmolLM2 end to end from its GGUF and from a sharded safetensors folder written from it: the same tokens."""

import json
from pathlib import Path

import pytest
from conftest import build_quietly
from safetensors.torch import save_file

from zonda.models.checkpoints import open_checkpoint
from zonda.runtime import Pipeline, SamplingParams
from zonda.runtime.bundle import open_bundle

pytestmark = pytest.mark.slow

PROMPTS = ["The capital of France is", "def fibonacci(n):\n    ", "Once, in the lee of the Andes,"]
SHARD = 200 << 20


def write_shards(source: Path, folder: Path) -> Path:
    """The GGUF's tensors, dequantised, in shards with an index; its configuration and its tokenizer beside them."""
    checkpoint = open_checkpoint(source)
    folder.mkdir()
    shards: list[dict] = [{}]
    size = 0
    for name in checkpoint.tensors:
        tensor = checkpoint.load(name).contiguous()
        if size + tensor.nbytes > SHARD and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    assert len(shards) > 1
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    for name, data in checkpoint.files.items():
        (folder / name).write_bytes(data)
    return folder


def test_the_same_tokens_from_both(smollm2_gguf, tmp_path):
    exact = build_quietly(smollm2_gguf, tmp_path / "gguf", quality="exact")
    bundle = build_quietly(write_shards(smollm2_gguf, tmp_path / "folder"), tmp_path / "bundle")
    source = open_bundle(bundle).manifest.source
    assert source.format == "safetensors F32"
    assert len(source.sha256) > 1
    params = SamplingParams(temperature=0.0, max_tokens=40)
    with Pipeline.load(bundle) as ours, Pipeline.load(exact) as theirs:
        for prompt in PROMPTS:
            assert ours.generate(prompt, params).token_ids == theirs.generate(prompt, params).token_ids
