"""Strict loading: every tensor used, every parameter filled, tied weights the same."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from zonda import CheckpointError
from zonda.models import layers
from zonda.models.checkpoints.base import CheckpointSource, TensorInfo
from zonda.models.loading import load_weights, match_parameters
from zonda.models.quantization import BlockQuantized, Form
from zonda.models.quantize import quantized_forms


@dataclass
class Held:
    """A checkpoint in memory."""

    held: dict[str, Tensor]
    quantised: dict[str, BlockQuantized] = field(default_factory=dict)
    kind: str = "normal"
    source: CheckpointSource = CheckpointSource("held", "memory")  # noqa: RUF009
    config: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        floats = {name: TensorInfo(tuple(t.shape), t.dtype, str(t.dtype)) for name, t in self.held.items()}
        return floats | {n: TensorInfo(q.shape, torch.float32, "blocks", q.form) for n, q in self.quantised.items()}

    def load(self, name: str) -> Tensor:
        return self.quantised[name].dequantize() if name in self.quantised else self.held[name]

    def blocks(self, name: str) -> BlockQuantized | None:
        return self.quantised.get(name)

    def sha256(self) -> dict[str, str]:
        return {}


class Model(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4, bias=False)
        self.lm_head = nn.Linear(4, 6, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight


EMBED, NORM = torch.arange(24).reshape(6, 4).float(), torch.ones(4)


def model(tied: bool = True) -> Model:
    with torch.device("meta"):
        return Model(tied)


def test_fills_a_model_on_the_meta_device():
    filled = model()
    load_weights(filled, Held({"embed.weight": EMBED.half(), "norm.weight": NORM}))
    assert torch.equal(filled.embed.weight, EMBED)
    assert filled.embed.weight.dtype == torch.float32
    assert filled.lm_head.weight is filled.embed.weight
    assert not any(parameter.requires_grad for parameter in filled.parameters())


def test_integer_codes_stay_integers():
    filled = nn.Module()
    filled.codes = nn.Parameter(torch.empty(4, dtype=torch.int8, device="meta"), requires_grad=False)
    load_weights(filled, Held({"codes": torch.tensor([1, -2, 3, -4], dtype=torch.int8)}))
    assert filled.codes.dtype == torch.int8


@pytest.mark.parametrize(
    "names", [["embed.weight"], ["lm_head.weight"], ["embed.weight", "lm_head.weight"]], ids=" and ".join
)
def test_a_tied_weight_may_have_either_name_or_both(names):
    held = Held(dict.fromkeys(names, EMBED) | {"norm.weight": NORM})
    matched = match_parameters(model(), held)
    assert set(matched) == {"embed.weight", "lm_head.weight", "norm.weight"}
    assert matched["lm_head.weight"] == matched["embed.weight"] == names[0]


def test_tied_weights_must_be_the_same_bytes():
    other = EMBED.clone()
    other[5, 3] += 1e-6 * other[5, 3]
    held = Held({"embed.weight": EMBED, "lm_head.weight": other, "norm.weight": NORM})
    with pytest.raises(CheckpointError, match=r"ties embed\.weight and lm_head\.weight, but their weights differ"):
        match_parameters(model(), held)
    nan = torch.full_like(EMBED, float("nan"))
    match_parameters(model(), Held({"embed.weight": nan, "lm_head.weight": nan.clone(), "norm.weight": NORM}))


def test_an_untied_head_must_be_there():
    with pytest.raises(CheckpointError, match=r"held does not fit the model: 1 missing: lm_head\.weight"):
        match_parameters(model(tied=False), Held({"embed.weight": EMBED, "norm.weight": NORM}))


def blocks(rows: int = 6, offsets: bool = True) -> BlockQuantized:
    codes = torch.arange(rows * 32, dtype=torch.uint8).reshape(rows, 32)
    scales = torch.arange(rows * 2).reshape(rows, 2).float()
    return BlockQuantized(8, 16, codes, scales, -scales if offsets else None)


def quantised_model(form: Form | None = None) -> nn.Module:
    with torch.device("meta"):
        made = nn.Module()
        made.head = layers.QLinear(32, 6, form or blocks().form)
    return made


def test_codes_scales_and_offsets_come_from_one_tensor_read_once():
    held = Held({}, {"head.weight": blocks()})
    assert match_parameters(quantised_model(), held) == {
        "head.codes": "head.weight",
        "head.scales": "head.weight",
        "head.offsets": "head.weight",
    }
    filled, reads, blocks_of = quantised_model(), [], held.blocks
    held.blocks = lambda name: reads.append(name) or blocks_of(name)
    load_weights(filled, held, dtype=torch.float64)
    assert reads == ["head.weight"]
    assert torch.equal(filled.head.codes, blocks().codes)
    assert torch.equal(filled.head.scales, blocks().scales.double())
    assert torch.equal(filled.head.offsets, -blocks().scales.double())


def test_a_quantised_weight_must_be_there_in_its_shape_and_form():
    wrong = {
        "1 missing: head.weight": Held({}),
        r"1 of another shape: head.weight \[5, 32\], expected \[6, 32\]": Held({}, {"head.weight": blocks(5)}),
        "1 of another form: head.weight, which is blocks, expected 8 bits, blocks of 16, offsets": Held(
            {}, {"head.weight": blocks(offsets=False)}
        ),
        r"1 of another form: head.weight, which is torch.float32": Held({"head.weight": torch.zeros(6, 32)}),
    }
    for words, held in wrong.items():
        with pytest.raises(CheckpointError, match=words):
            match_parameters(quantised_model(), held)


class Tied(nn.Module):
    def __init__(self, table: type[nn.Module]) -> None:
        super().__init__()
        self.embed = table(6, 32)
        self.lm_head = layers.Linear(32, 6)
        self.lm_head.weight = self.embed.weight


def test_a_shared_weight_is_quantised_if_all_who_share_it_can_hold_it():
    held = Held({}, {"embed.weight": blocks()})
    form = blocks().form
    assert quantized_forms(Tied(layers.Embedding), held) == {"embed.weight": form, "lm_head.weight": form}
    assert quantized_forms(Tied(nn.Embedding), held) == {}
    both = Held({}, {"embed.weight": blocks(), "lm_head.weight": blocks(offsets=False)})
    assert quantized_forms(Tied(layers.Embedding), both) == {}


def test_a_subclass_of_linear_stays_what_it_is():
    class Other(layers.Linear):
        pass

    made = nn.Module()
    made.head = Other(32, 6)
    assert quantized_forms(made, Held({}, {"head.weight": blocks()})) == {}


def test_one_error_names_everything_that_is_wrong():
    held = Held({"embed.weight": EMBED[:5], "surplus": NORM, "other": NORM})
    with pytest.raises(CheckpointError) as caught:
        match_parameters(model(), held)
    assert str(caught.value) == (
        "held does not fit the model: 1 missing: norm.weight; 2 unexpected: surplus, other; "
        "1 of another shape: embed.weight [5, 4], expected [6, 4]"
    )


def test_a_long_list_is_cut_and_counted():
    held = Held({"embed.weight": EMBED, "norm.weight": NORM} | {f"surplus.{i}": NORM for i in range(30)})
    with pytest.raises(CheckpointError, match=r"30 unexpected: surplus\.0, .*surplus\.7 and 22 more"):
        match_parameters(model(), held)


def test_tensors_that_carry_nothing_are_ignored_by_pattern():
    held = Held({"embed.weight": EMBED, "norm.weight": NORM, "layers.3.rotary_emb.inv_freq": NORM})
    match_parameters(model(), held, ["layers.*.rotary_emb.inv_freq"])
    with pytest.raises(CheckpointError, match="inv_freq"):
        match_parameters(model(), held, ["layers.*.other"])
