"""A build streams: its memory does not grow with the weights."""

import json
import subprocess
import sys
import time

import psutil
import pytest
from conftest import tiny_tokenizer

pytestmark = pytest.mark.slow

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
RUN = """
import resource, sys
from pathlib import Path
from rich.console import Console
from zonda.build_engine import BuildOptions, build_bundle
build_bundle(sys.argv[1], Path(sys.argv[2]), BuildOptions(verify="off"), Console(quiet=True))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def write_sparse_checkpoint(folder, layers: int) -> int:
    """A bf16 checkpoint of zeros that takes no room on disk; returns its parameters."""
    h, i, kv = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["hidden_size"] // 4
    shapes = {"model.embed_tokens.weight": [SHAPE["vocab_size"], h], "model.norm.weight": [h]}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{n}.weight": [h] for n in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{prefix}.self_attn.{n}_proj.weight": [h if n in "qo" else kv, h] for n in "qkvo"}
        shapes |= {f"{prefix}.mlp.{n}_proj.weight": [i, h] for n in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = [h, i]
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    data = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + end)
    (folder / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": layers}))
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return end // 2


def test_peak_memory_does_not_follow_the_weights(tmp_path):
    peaks, sizes = [], []
    for layers in (2, 14):
        parameters = write_sparse_checkpoint(tmp_path / f"model{layers}", layers)
        command = [sys.executable, "-c", RUN, tmp_path / f"model{layers}", tmp_path / f"out{layers}"]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(run.stdout) * 1024)
        sizes.append(4 * parameters)
    assert sizes[1] - sizes[0] > 700e6
    assert peaks[1] - peaks[0] < 150e6


def test_a_build_with_its_proof_takes_no_more_than_it_says(smollm2_gguf, tmp_path, request):
    """1.5 GB for SmolLM2-135M, whose float32 weights are 0.54 GB: the exporter and the engine's process together."""
    command = [sys.executable, "build_engine.py", str(smollm2_gguf), "-o", str(tmp_path / "out")]
    build = psutil.Popen(command, cwd=request.config.rootpath, stdout=subprocess.DEVNULL)
    peak = samples = 0
    while build.poll() is None:
        resident = 0
        for process in (build, *build.children(recursive=True)):
            try:
                resident += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        peak, samples = max(peak, resident), samples + 1
        time.sleep(0.02)
    assert build.returncode == 0
    assert samples > 100
    assert peak < 1.5e9
