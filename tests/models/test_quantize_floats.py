"""Which weights `--quant` puts into which form, and the view that shows them so."""

import gc

import pytest
import torch
from conftest import write_folder
from safetensors.torch import load_file, save_file

from zonda import BuildError, CheckpointError
from zonda.models import block_search, form_choice, mixtral, qwen2_moe
from zonda.models.checkpoints import open_checkpoint
from zonda.models.checkpoints.base import CheckpointSource, TensorInfo
from zonda.models.form_choice import choose_forms
from zonda.models.llama import Llama, LlamaConfig
from zonda.models.loading import match_parameters, wanted_tensors
from zonda.models.quantization import Form
from zonda.models.quantize import quantize_modules, quantized_forms
from zonda.models.quantize_floats import QuantizedCheckpoint, quantized

INT8, INT4 = Form(8, 32, offsets=False), Form(4, 32, offsets=True)
UP = "model.layers.0.mlp.up_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def checkpoint(tiny_folder):
    return open_checkpoint(tiny_folder)


def llama(checkpoint) -> Llama:
    with torch.device("meta"):
        return Llama(LlamaConfig.read(checkpoint.config), 16)


class Shapes:
    """A checkpoint that has every tensor a model wants, uniform noise; `normal` is a fifth harder to hold in 4 bits."""

    def __init__(self, model: torch.nn.Module, normal: tuple[str, ...] = ()) -> None:
        self.source = CheckpointSource("noise", "safetensors F32")
        self.kind, self.config, self.files = "normal", {}, {}
        self.tensors = {n: TensorInfo(w.shape, torch.float32, "F32") for n, w in wanted_tensors(model).items()}
        self.normal = normal

    def load(self, name: str) -> torch.Tensor:
        draw = torch.randn if name in self.normal else torch.rand
        return draw(self.tensors[name].shape, generator=torch.Generator().manual_seed(len(name)))

    def blocks(self, name: str) -> None:
        return None


def model_of(layers: int, **changes) -> Llama:
    """Of proportions as they are: attention's inputs are 9 % of the linears, MLPs' outputs 30 %."""
    values = {
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
    }
    with torch.device("meta"):
        return Llama(LlamaConfig.read(values | changes), 16)


def test_int8_holds_every_weight_in_8_bits(checkpoint):
    choice = choose_forms(llama(checkpoint), checkpoint, "int8")
    assert set(choice.forms.values()) == {INT8}
    assert {name for name in checkpoint.tensors if "norm" not in name} == choice.forms.keys()
    assert (choice.weights, choice.raised) == (16, 0)


def test_int4_holds_embedding_and_head_in_8_bits_and_raises_attention_inputs_first():
    model = model_of(4)
    choice = choose_forms(model, Shapes(model), "int4")
    assert choice.forms[EMBEDDING] == choice.forms[HEAD] == INT8
    for layer in range(4):
        forms = [choice.forms[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkvo"]
        assert forms == [INT8, INT8, INT8, INT4]
        assert choice.forms[f"model.layers.{layer}.mlp.gate_proj.weight"] == INT4
    downs = [choice.forms[f"model.layers.{layer}.mlp.down_proj.weight"] for layer in range(4)]
    assert 0 < downs.count(INT8) < 4
    assert choice.raised == 12 + downs.count(INT8)


def test_the_budget_holds_and_the_worst_errors_go_first():
    model = model_of(8)
    normal = tuple(f"model.layers.{layer}.mlp.down_proj.weight" for layer in (3, 6))
    choice = choose_forms(model, Shapes(model, normal), "int4")
    raised = [n for n, form in choice.forms.items() if form == INT8 and "down_proj" in n]
    assert set(normal) <= set(raised)
    linears = [n for n in choice.forms if n.endswith("_proj.weight")]
    size = {INT4: 24, INT8: 36}  # bytes of a block of 32
    count = {n: wanted_tensors(model)[n].shape for n in linears}
    blocks = {n: rows * columns // 32 for n, (rows, columns) in count.items()}
    assert sum(blocks[n] * size[choice.forms[n]] for n in linears) <= 1.125 * 24 * sum(blocks.values())


def test_joined_linears_are_of_one_form_where_the_budget_does_not_take_all(checkpoint):
    """In the tiny model attention's inputs are 27 % of the linears."""
    choice = choose_forms(llama(checkpoint), checkpoint, "int4")
    forms = [{choice.forms[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkv"} for layer in (0, 1)]
    assert sorted(map(str, forms)) == sorted([str({INT4}), str({INT8})])


def test_a_tied_head_is_one_weight_under_two_names():
    model = model_of(1, tie_word_embeddings=True)
    stored = Shapes(model)
    del stored.tensors[HEAD]
    choice = choose_forms(model, stored, "int4")
    assert choice.forms[EMBEDDING] == choice.forms[HEAD] == INT8
    assert choice.weights == 8


MOE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize("architecture", [mixtral.MIXTRAL, qwen2_moe.QWEN2_MOE], ids=lambda a: a.names[0])
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_experts_and_routers_stay_in_floats(architecture, quant):
    with torch.device("meta"):
        model = architecture.build(architecture.read_config(MOE), 16)
    forms = choose_forms(model, Shapes(model), quant).forms
    floats = wanted_tensors(model).keys() - forms.keys()
    routed = {n for n in floats if n.endswith(("gate.weight", "experts.gate_up_proj", "experts.down_proj"))}
    assert len(routed) == (4 if architecture is qwen2_moe.QWEN2_MOE else 3)
    assert all("norm" in name or name.endswith(".bias") for name in floats - routed)


def test_rows_that_do_not_divide_into_blocks_stay_in_floats():
    model = model_of(1, intermediate_size=112)
    forms = choose_forms(model, Shapes(model), "int8").forms
    assert "model.layers.0.mlp.down_proj.weight" not in forms
    assert UP in forms


def test_a_model_without_such_rows_is_refused():
    model = model_of(1, hidden_size=72, intermediate_size=72)
    with pytest.raises(BuildError, match="no linear or embedding whose rows divide into blocks of 32"):
        choose_forms(model, Shapes(model), "int8")


def test_weights_that_are_in_blocks_already_are_refused(checkpoint):
    once = quantized(checkpoint, llama(checkpoint), "int4", None)
    with pytest.raises(BuildError, match=r"has 16 of its 16 in blocks already, the first model\.embed_tokens"):
        choose_forms(llama(checkpoint), once, "int8")


def test_none_changes_nothing(checkpoint, tmp_path):
    assert quantized(checkpoint, llama(checkpoint), "none", tmp_path) is checkpoint


def test_the_view_shows_blocks_and_what_they_stand_for(checkpoint, tmp_path):
    view = quantized(checkpoint, llama(checkpoint), "int4", tmp_path)
    blocks = view.blocks(UP)
    assert blocks.form == view.tensors[UP].form == INT4
    assert torch.equal(view.load(UP), blocks.dequantize())
    assert torch.equal(blocks.codes, block_search.quantize(checkpoint.load(UP), INT4).codes)
    norm = "model.norm.weight"
    assert view.blocks(norm) is None
    assert torch.equal(view.load(norm), checkpoint.load(norm))
    assert view.tensors[norm] == checkpoint.tensors[norm]
    assert view.sha256() == checkpoint.sha256()
    made = view.source.quantization
    assert (made.quant, made.weights, made.raised) == ("int4", 16, 4)


def test_the_view_fits_the_model(checkpoint, tmp_path):
    model = llama(checkpoint)
    view = quantized(checkpoint, model, "int4", tmp_path)
    quantize_modules(model, quantized_forms(model, view))
    assert match_parameters(model, view)[UP.replace("weight", "offsets")] == UP


def test_each_weight_is_quantised_once_and_no_file_is_left(checkpoint, tmp_path, monkeypatch):
    calls, honest = [], block_search.quantize
    monkeypatch.setattr(block_search, "quantize", lambda *given: calls.append(given) or honest(*given))
    view = quantized(checkpoint, llama(checkpoint), "int8", tmp_path / "not yet there")
    first = {name: view.blocks(name) for name in (UP, HEAD, EMBEDDING)}
    for name, blocks in first.items():
        again = view.blocks(name)
        assert torch.equal(again.codes, blocks.codes)
        assert torch.equal(again.scales, blocks.scales)
        assert torch.equal(view.load(name), blocks.dequantize())
    assert len(calls) == 3
    assert list(tmp_path.iterdir()) == []
    file = view._file
    del view
    gc.collect()
    assert file.closed


def test_a_folder_that_cannot_be_written_is_said(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    view = quantized(checkpoint, llama(checkpoint), "int8", tmp_path / "file")
    with pytest.raises(
        BuildError, match=r"cannot keep the quantised model\.layers\.0\.mlp\.up_proj\.weight in a temporary file"
    ):
        view.blocks(UP)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_said(tmp_path, value):
    folder = write_folder(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors[UP][5, 40] = value
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    view = QuantizedCheckpoint(checkpoint, form_choice.Choice("int4", {UP: INT4}, 1), tmp_path)
    with pytest.raises(CheckpointError, match=rf"{UP} has a weight that is not a finite number"):
        view.blocks(UP)
