"""LoRA adapters: the merged model computes what the unmerged one does, and every tensor and option is accounted for."""

import json

import numpy as np
import pytest
import torch
import transformers
from adapters import CONFIG, PREFIX, apply_unmerged, factors, write_adapter
from checkpoint_files import write_model
from conftest import TINY, write_folder
from gguf import GGMLQuantizationType
from safetensors.torch import save_file
from support import RELATIVE_TOLERANCE, Eager, randomise

from zonda import CheckpointError, ConfigError
from zonda.models import registry
from zonda.models.checkpoints import open_checkpoint
from zonda.models.checkpoints.lora import merge_adapters, parse_lora
from zonda.models.loading import load_weights

SHAPES = {
    f"model.layers.{layer}.self_attn.{name}": shape
    for layer in (0, 1)
    for name, shape in (("q_proj", (64, 64)), ("v_proj", (32, 64)))
}
Q0 = "model.layers.0.self_attn.q_proj"
IDS = torch.from_numpy(np.random.default_rng(0).integers(0, 250, (2, 12)))


def logits(checkpoint) -> torch.Tensor:
    """Of our eager model, filled from the checkpoint."""
    architecture = registry.of_config(checkpoint.config)
    model = architecture.build(architecture.read_config(checkpoint.config), 16).eval()
    load_weights(model, checkpoint)
    ids = IDS.numpy()
    positions = np.arange(12)[None].repeat(2, 0)
    return torch.from_numpy(Eager(model, 2, 16).step(ids, np.zeros(2, np.int32), np.full(2, 12, np.int32), positions))


def reference(folder, *adapters, family=transformers.LlamaForCausalLM) -> torch.Tensor:
    """Of the transformers model with unmerged adapters: (factors, factor)."""
    model = family.from_pretrained(folder, dtype=torch.float32).eval()
    for made, factor in adapters:
        apply_unmerged(model, made, factor)
    with torch.no_grad():
        return model(IDS).logits


def check_same(found: torch.Tensor, wanted: torch.Tensor, base: torch.Tensor) -> None:
    scale = wanted.abs().max().item()
    assert (base - wanted).abs().max() > 0.05 * scale  # the adapter is no whisper
    torch.testing.assert_close(found, wanted, rtol=0, atol=2 * RELATIVE_TOLERANCE * scale)


def merged(folder, *adapters):
    return merge_adapters(open_checkpoint(folder), adapters)


@pytest.mark.parametrize("scale", [1.0, 0.5, -1.0])
@pytest.mark.parametrize(("rslora", "factor"), [(False, 16 / 4), (True, 16 / 2)])
def test_the_merged_model_computes_what_the_unmerged_one_does(tiny_folder, tmp_path, rslora, factor, scale):
    made = factors(SHAPES)
    path = write_adapter(tmp_path / "a", made, use_rslora=rslora)
    found = logits(merged(tiny_folder, (path, scale)))
    check_same(found, reference(tiny_folder, (made, scale * factor)), reference(tiny_folder))


def test_several_adapters_add_up(tiny_folder, tmp_path):
    first, second = factors(SHAPES), factors({Q0: (64, 64)}, rank=3, seed=1)
    one = write_adapter(tmp_path / "one", first)
    two = write_adapter(tmp_path / "two", second, r=3, lora_alpha=6, target_modules=r".*0.*\.q_proj")
    checkpoint = merged(tiny_folder, (one, 1.0), (two, 0.25))
    wanted = reference(tiny_folder, (first, 4.0), (second, 0.5))
    check_same(logits(checkpoint), wanted, reference(tiny_folder, (first, 4.0)))
    assert [(a.name, a.scale) for a in checkpoint.source.adapters] == [("one", 1.0), ("two", 0.25)]


def test_ranks_and_alphas_of_their_own(tiny_folder, tmp_path):
    """Patterns match the end of a name, and the whole of it behind a ^; the first that matches counts."""
    made = factors({**SHAPES}) | factors({Q0: (64, 64)}, rank=7, seed=2)
    path = write_adapter(
        tmp_path / "a",
        made,
        rank_pattern={f"^{Q0}": 7, "^q_proj": 5},
        alpha_pattern={"1.self_attn.v_proj": 2, "v_proj": 12, "_proj": 1},
    )
    factor = dict.fromkeys(SHAPES, 16 / 4) | {Q0: 16 / 7}
    factor |= {"model.layers.0.self_attn.v_proj": 12 / 4, "model.layers.1.self_attn.v_proj": 2 / 4}
    check_same(logits(merged(tiny_folder, (path, 1.0))), reference(tiny_folder, (made, factor)), reference(tiny_folder))


def test_modules_stored_whole_and_biases(tmp_path):
    folder = write_folder(tmp_path / "m", attention_bias=True)
    head, bias = torch.randn(300, 64) * 0.1, torch.randn(64)
    checkpoint = open_checkpoint(folder)
    head = head[: checkpoint.tensors["lm_head.weight"].shape[0]]
    made = factors({Q0: (64, 64)})
    extra = {f"{PREFIX}lm_head.weight": head.bfloat16(), f"{PREFIX}{Q0}.base_layer.bias": bias}
    options = {"target_modules": ["0.self_attn.q_proj"], "modules_to_save": ["lm_head"], "bias": "all"}
    path = write_adapter(tmp_path / "a", made, extra=extra, **options)
    found = merged(folder, (path, 1.0))
    assert torch.equal(found.load("lm_head.weight"), head.bfloat16().float())
    assert torch.equal(found.load(f"{Q0}.bias"), bias)
    for name in checkpoint.tensors.keys() - {"lm_head.weight", f"{Q0}.bias", f"{Q0}.weight"}:
        assert torch.equal(found.load(name), checkpoint.load(name))


def test_an_adapted_embedding(tiny_folder, tmp_path):
    base = open_checkpoint(tiny_folder).load("model.embed_tokens.weight")
    a, b = torch.randn(4, len(base)), torch.randn(64, 4)
    name = f"{PREFIX}model.embed_tokens.lora_embedding_"
    path = write_adapter(tmp_path / "a", {}, extra={f"{name}A": a, f"{name}B": b}, target_modules=["embed_tokens"])
    found = merged(tiny_folder, (path, 0.5)).load("model.embed_tokens.weight")
    torch.testing.assert_close(found, base + 0.5 * 4 * (b @ a).T)


def test_packed_weights_take_adapters_of_their_own_names(tmp_path):
    """Phi 3 has q, k and v in one linear, in the checkpoint and in the adapter."""
    sizes = {key: value for key, value in TINY.items() if key != "num_key_value_heads"}
    hf = transformers.Phi3ForCausalLM(transformers.Phi3Config(vocab_size=251, pad_token_id=0, **sizes)).eval()
    randomise(hf)
    hf.save_pretrained(tmp_path / "m")
    made = factors({f"model.layers.{layer}.self_attn.qkv_proj": (192, 64) for layer in (0, 1)})
    path = write_adapter(tmp_path / "a", made, target_modules=["qkv_proj"])
    wanted = reference(tmp_path / "m", (made, 4.0), family=transformers.Phi3ForCausalLM)
    check_same(logits(merged(tmp_path / "m", (path, 1.0))), wanted, hf(IDS).logits.detach())


def test_weights_are_merged_when_they_are_loaded(tiny_folder, tmp_path, monkeypatch):
    """And only those asked for; the checkpoint's own stay mapped."""
    from zonda.models.checkpoints.safetensors import SafetensorsFile

    checkpoint = merged(tiny_folder, (write_adapter(tmp_path / "a", factors(SHAPES)), 1.0))
    read = []
    load = SafetensorsFile.load
    monkeypatch.setattr(SafetensorsFile, "load", lambda self, name: read.append(name) or load(self, name))
    checkpoint.load(f"{Q0}.weight")
    assert read == [f"{Q0}.weight", f"{PREFIX}{Q0}.lora_B.weight", f"{PREFIX}{Q0}.lora_A.weight"]


def test_a_half_precision_base_is_merged_in_float32(tiny_folder, tmp_path):
    checkpoint = open_checkpoint(tiny_folder)
    half = {name: checkpoint.load(name).bfloat16() for name in checkpoint.tensors}
    folder = write_folder(tmp_path / "m")
    save_file(half, folder / "model.safetensors")
    made = factors(SHAPES)
    found = merged(folder, (write_adapter(tmp_path / "a", made), 1.0))
    assert found.tensors[f"{Q0}.weight"].dtype == torch.float32
    a, b = made[Q0]
    wanted = half[f"{Q0}.weight"].double() + 4.0 * (b.double() @ a.double())
    torch.testing.assert_close(found.load(f"{Q0}.weight").double(), wanted, rtol=1e-6, atol=1e-6)


def test_a_quantised_base_is_dequantised_where_it_is_adapted_and_says_so(tmp_path):
    path = write_model(tmp_path / "m.gguf", quant=GGMLQuantizationType.Q8_0, hidden=64)
    base = open_checkpoint(path)
    made = factors({Q0: (64, 64)})
    checkpoint = merge_adapters(base, [(write_adapter(tmp_path / "a", made, target_modules=["q_proj"]), 1.0)])
    assert checkpoint.source.format == "GGUF Q8_0, 1 of its weights dequantised to merge adapters"
    assert checkpoint.tensors[f"{Q0}.weight"].form is None
    assert checkpoint.blocks(f"{Q0}.weight") is None
    a, b = made[Q0]
    torch.testing.assert_close(checkpoint.load(f"{Q0}.weight"), base.load(f"{Q0}.weight") + 4.0 * b @ a)
    other = Q0.replace("q_proj", "k_proj") + ".weight"
    assert checkpoint.tensors[other] == base.tensors[other]
    assert torch.equal(checkpoint.blocks(other).codes, base.blocks(other).codes)


def test_without_adapters_the_checkpoint_is_itself(tiny_folder):
    checkpoint = open_checkpoint(tiny_folder)
    assert merge_adapters(checkpoint, []) is checkpoint


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_dora", True), ("use_qalora", True), ("lora_bias", True), ("fan_in_fan_out", True),
        ("layer_replication", [[0, 2]]), ("megatron_config", {"a": 1}), ("target_parameters", ["experts.down"]),
        ("trainable_token_indices", [1]), ("alora_invocation_tokens", [1]), ("invented_tomorrow", 0.5),
    ],
)  # fmt: skip
def test_an_option_that_is_not_merged_is_refused_by_name(tiny_folder, tmp_path, option, value):
    path = write_adapter(tmp_path / "a", factors(SHAPES), **{option: value})
    with pytest.raises(ConfigError, match=f"adapter_config.json: {option} = .* is not supported: "):
        merged(tiny_folder, (path, 1.0))


def test_options_that_are_off_do_not_matter(tiny_folder, tmp_path):
    path = write_adapter(tmp_path / "a", factors(SHAPES), invented_tomorrow=None, eva_config=None, use_dora=False)
    merged(tiny_folder, (path, 1.0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type must be one of LORA"),
        ({"r": 0}, "r must be an integer of at least 1"),
        ({"r": 10**400}, "r must be an integer of at most"),
        ({"lora_alpha": "16"}, "lora_alpha must be a number"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a number"),
        ({"bias": "some"}, "bias must be one of"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changed the base weights"),
        ({"init_lora_weights": {"a": 1}}, "init_lora_weights .* changed the base weights"),
        ({"rank_pattern": {"(a+)+$": 4}}, r"'\(a\+\)\+\$' is no name of a module, and regular expressions"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: q_proj must be an integer"),
        ({"alpha_pattern": [1]}, "alpha_pattern: expected an object"),
        ({"target_modules": {"q_proj": 1}}, "target_modules must be a list of strings"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of strings"),
    ],
)
def test_a_configuration_that_is_wrong(tiny_folder, tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        merged(tiny_folder, (write_adapter(tmp_path / "a", factors(SHAPES), **changes), 1.0))


A, B = f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"
ONE = {"target_modules": ["0.self_attn.q_proj"]}


@pytest.mark.parametrize(
    ("extra", "changes", "words"),
    [
        ({A: torch.ones(4, 64)}, ONE, r"has .*lora_A.weight alone; A and B belong together"),
        ({A: torch.ones(4, 64), B: torch.ones(64, 3)}, ONE, r"rank 4 and .*q_proj.weight \[64, 64\] do not go with"),
        ({A: torch.ones(4, 63), B: torch.ones(64, 4)}, ONE, r"\[4, 63\]"),
        ({A: torch.ones(8, 64), B: torch.ones(64, 8)}, ONE, r"rank 4"),
        ({A: torch.ones(4, 64).int(), B: torch.ones(64, 4)}, ONE, "of type I32"),
        ({A: torch.ones(4, 64), B: torch.ones(64, 4)}, {}, r"has no factors for .*, which its target_modules names"),
        ({A: torch.ones(4, 64), B: torch.ones(64, 4)}, {"target_modules": ["v_proj"]}, "target_modules does not name"),
        ({A.replace("q_proj", "x"): torch.ones(4, 64), B.replace("q_proj", "x"): torch.ones(64, 4)}, ONE, "no weight for"),
        ({"model.x.lora_A.weight": torch.ones(4, 64)}, ONE, "a name begins with base_model.model."),
        ({f"{PREFIX}{Q0}.lora_magnitude_vector": torch.ones(64)}, ONE, "neither A nor B"),
        ({f"{PREFIX}{Q0}.lora_A.default.weight": torch.ones(4, 64)}, ONE, "neither A nor B"),
        ({f"{PREFIX}{Q0}.bias": torch.ones(64)}, ONE, "replaces .*q_proj.bias .*checkpoint has no such tensor"),
        ({f"{PREFIX}lm_head.weight": torch.ones(9, 64)}, ONE, r"replaces lm_head.weight by one of shape \[9, 64\], but"),
        ({f"{PREFIX}model.norm.weight": torch.ones(64)}, {"modules_to_save": ["lm_head"]}, "no tensor for lm_head"),
        ({}, ONE, "holds no tensors"),
    ],
)  # fmt: skip
def test_every_tensor_is_accounted_for(tiny_folder, tmp_path, extra, changes, words):
    path = write_adapter(tmp_path / "a", {}, extra=extra, **changes)
    with pytest.raises(CheckpointError, match=words):
        merged(tiny_folder, (path, 1.0))


def test_a_module_stored_whole_has_no_scale_and_is_replaced_once(tiny_folder, tmp_path):
    path = write_adapter(tmp_path / "a", {}, extra={f"{PREFIX}model.norm.weight": torch.ones(64)}, target_modules=[])
    with pytest.raises(CheckpointError, match=r"as a whole, which no scale but 1 can do; found 0\.5"):
        merged(tiny_folder, (path, 0.5))
    with pytest.raises(CheckpointError, match="which another adapter has replaced already"):
        merged(tiny_folder, (path, 1.0), (path, 1.0))


def test_the_table_of_a_tied_head_is_not_merged(tmp_path):
    folder = write_folder(tmp_path / "m", tie_word_embeddings=True)
    base = open_checkpoint(folder).tensors["model.embed_tokens.weight"].shape
    extra = {f"{PREFIX}model.embed_tokens.weight": torch.ones(base)}
    path = write_adapter(tmp_path / "a", {}, extra=extra, target_modules=[], modules_to_save=["embed_tokens"])
    with pytest.raises(CheckpointError, match=r"changes model\.embed_tokens\.weight, which the head shares"):
        merged(folder, (path, 1.0))


def test_biases_that_were_trained_must_be_there(tmp_path):
    folder = write_folder(tmp_path / "m", attention_bias=True)
    path = write_adapter(tmp_path / "a", factors({Q0: (64, 64)}), **ONE, bias="lora_only")
    with pytest.raises(CheckpointError, match=r"has no .*q_proj\.bias, though its configuration says"):
        merged(folder, (path, 1.0))


def test_layers_that_were_left_out_on_purpose(tiny_folder, tmp_path):
    path = write_adapter(tmp_path / "a", factors({Q0: (64, 64)}), target_modules=["q_proj"], layers_to_transform=[0])
    merged(tiny_folder, (path, 1.0))


def test_a_folder_that_is_no_adapter(tiny_folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json, so it is no adapter of PEFT"):
        merged(tiny_folder, (tmp_path, 1.0))
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors; a pickle .* runs the code in it"):
        merged(tiny_folder, (tmp_path, 1.0))


def test_path_and_scale_of_the_command_line(tmp_path):
    odd = tmp_path / "a:2"
    odd.mkdir()
    assert parse_lora("a/b") == (tmp_path.__class__("a/b"), 1.0)
    assert parse_lora("a/b:0.5") == (tmp_path.__class__("a/b"), 0.5)
    assert parse_lora("a/b:-1e-1") == (tmp_path.__class__("a/b"), -0.1)
    assert parse_lora(str(odd)) == (odd, 1.0)
    assert parse_lora(f"{odd}:3") == (odd, 3.0)
    for text in ("a/b:", "a/b:x", "a/b:nan", "a/b:inf"):
        with pytest.raises(CheckpointError, match="is no scale; write PATH"):
            parse_lora(text)
