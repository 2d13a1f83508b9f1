"""Every type of GGUF in a random model: its logits are those of transformers with the dequantised weights."""

import gguf
import numpy as np
import pytest
import torch
import transformers
from checkpoint_files import HEADS, KV_HEADS, TOKENS, permute, weights, write_model
from conftest import build_quietly
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from gguf_rows import FORMLESS, KINDS, weight_rows
from support import RELATIVE_TOLERANCE, Eager, run_scenario

from zonda.models import registry
from zonda.models.checkpoints import open_checkpoint
from zonda.models.loading import load_weights
from zonda.models.quantize import dequantized_types, quantize_modules, quantized_forms
from zonda.runtime import Pipeline, SamplingParams
from zonda.runtime.bundle import open_bundle

HIDDEN, LAYERS, ROWS = 256, 2, 64
FLOATS = [Type.F64, Type.F32, Type.F16, Type.BF16]
IDS = np.random.default_rng(0).integers(0, len(TOKENS), (1, 24))
DTYPES = {Type.F64: np.float64, Type.F32: np.float32, Type.F16: np.float16}


def write(path, kind: Type, spread: float = 2) -> transformers.LlamaForCausalLM:
    """A GGUF whose matrices are all of this type, and transformers' model of the same weights, dequantised by gguf.

    spread: the standard deviation of weights, in roots of the width.
    """
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    stored, state = {}, {}
    for layer in range(LAYERS):
        for seed, (name, array) in enumerate(weights(HIDDEN).items()):
            name = name.replace("layers.0", f"layers.{layer}")
            key = names.get_name(name, (".weight",))
            random = np.random.default_rng(100 * layer + seed)
            if array.ndim == 1:
                stored[key] = floats = random.normal(1, 0.2, array.shape).astype(np.float32)
            else:
                deviation = 1 if "embed" in name else spread / array.shape[1] ** 0.5
                rows = _rows(kind, array.shape, deviation, seed)
                floats = rows.astype(np.float32) if kind in DTYPES else dequantize(rows, kind)
                heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
                stored[key] = (permute(rows, heads) if heads else rows, kind)
            state[name] = torch.from_numpy(floats)
    write_model(path, {"llama.block_count": LAYERS}, stored, drop=list(stored), hidden=HIDDEN)
    config = transformers.LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    hf = transformers.LlamaForCausalLM(config).eval()
    hf.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    return hf


def _rows(kind: Type, shape: tuple[int, int], deviation: float, seed: int) -> np.ndarray:
    if kind not in FLOATS:
        return weight_rows(kind, *shape, deviation, seed)
    normal = np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(deviation)
    return normal.astype(DTYPES[kind]) if kind in DTYPES else quantize(normal, kind)


def reference(hf: transformers.LlamaForCausalLM) -> np.ndarray:
    with torch.no_grad():
        return hf(torch.from_numpy(IDS)).logits.numpy()[0]


def build(checkpoint, *, blocks: bool):
    architecture = registry.of_config(checkpoint.config)
    with torch.device("meta"):
        model = architecture.build(architecture.read_config(checkpoint.config), ROWS).eval()
    if blocks:
        quantize_modules(model, quantized_forms(model, checkpoint))
    return model


@pytest.mark.parametrize("blocks", [False, True], ids=["dequantised", "in blocks"])
@pytest.mark.parametrize("kind", [*FLOATS, *KINDS, *FORMLESS], ids=lambda kind: kind.name)
def test_logits_are_those_of_the_dequantised_model(kind, blocks, tmp_path):
    wanted = reference(write(tmp_path / "m.gguf", kind))
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    model = build(checkpoint, blocks=blocks)
    lost = kind not in FLOATS and not (blocks and kind in KINDS)
    assert dequantized_types(model, checkpoint) == (kind.name if lost else "")
    load_weights(model, checkpoint)
    (found,) = run_scenario(Eager(model, 1, ROWS), IDS, [[10], [1], [13]])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=RELATIVE_TOLERANCE * np.abs(wanted).max())


def test_these_are_all_the_types_that_gguf_reads():
    readable = []
    for kind in Type:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        try:
            dequantize(np.zeros((1, size * 256 // min(block, 256)), np.uint8), kind)
        except NotImplementedError:
            continue
        readable.append(kind)
    assert {*readable, *FLOATS} == {*FLOATS, *KINDS, *FORMLESS}


@pytest.mark.parametrize("kind", FORMLESS, ids=lambda kind: kind.name)
def test_a_type_without_a_form_is_named_in_the_log(kind, tmp_path, caplog):
    write(tmp_path / "m.gguf", kind)
    open_checkpoint(tmp_path / "m.gguf")
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'm.gguf'}: tensors of {kind.name} are dequantised to float32"
    ]


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.IQ3_S, Type.Q2_K], ids=lambda kind: kind.name)
def test_a_bundle_built_from_it_answers_as_transformers_does(kind, tmp_path):
    hf = write(tmp_path / "m.gguf", kind, spread=1)  # the proof allows no more noise than such weights make
    bundle = build_quietly(tmp_path / "m.gguf", tmp_path / "bundle", capacity=ROWS)
    manifest = open_bundle(bundle).manifest
    assert manifest.source.format == f"GGUF {kind.name}"
    assert kind not in FORMLESS or manifest.quantization["dequantized"] == kind.name
    assert manifest.targets[0].parity.status == "passed"
    with Pipeline.load(bundle) as pipeline:
        ids = IDS[0].tolist()
        answer = pipeline.generate(ids, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)).token_ids
    out = list(ids)
    with torch.no_grad():
        for _ in range(8):
            out.append(int(hf(torch.tensor([out])).logits[0, -1].argmax()))
    assert list(answer) == out[len(ids) :]
