"""Mixtures of experts: only chosen experts run, the lowering takes the grouped operator, stacking is strict."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support import randomise

from zonda import CheckpointError
from zonda.export.functions import DOMAIN
from zonda.export.lower.onnxruntime import lower
from zonda.export.universal import export_universal
from zonda.models import ops
from zonda.models.architecture import Stack
from zonda.models.checkpoints.base import CheckpointSource, TensorInfo
from zonda.models.mixtral import Mixtral, MixtralConfig
from zonda.models.stacking import stacked

CONFIG = MixtralConfig.read(
    {
        "vocab_size": 31,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_local_experts": 4,
    }
)
STACKS = (Stack("l.{layer}.both", ("l.{layer}.{expert}.gate", "l.{layer}.{expert}.up")),)


class Held:
    """A checkpoint of tensors in memory."""

    kind, config, files = "normal", {}, {}
    source = CheckpointSource("held", "memory")

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.tensors = {name: TensorInfo(tuple(t.shape), t.dtype, "F32") for name, t in tensors.items()}

    def load(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def blocks(self, name: str) -> None:
        return None

    def sha256(self) -> dict[str, str]:
        return {}


def experts(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = [f"l.0.{expert}.{matrix}" for expert in range(count) for matrix in ("gate", "up")]
    return {name: torch.randn(3, 5, generator=generator) for name in names}


def test_experts_that_no_token_chose_do_not_run():
    """Their weights are NaN: one product with them would show."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, generator=random)
    gate_up, down = torch.randn(4, 12, 8, generator=random), torch.randn(4, 8, 6, generator=random)
    gate_up[2:], down[2:] = torch.nan, torch.nan
    scores = torch.randn(2, 3, 4, generator=random)
    scores[..., 2:] = -50
    assert ops.moe(x, scores, gate_up, down, None, None, 2, True, 1.0, 0.0, 0.0).isfinite().all()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_the_marker_is_a_sound_torch_operator(normalize, biased):
    x, scores = torch.randn(2, 3, 8), torch.randn(2, 3, 4)
    biases = (torch.randn(4, 12), torch.randn(4, 8)) if biased else (None, None)
    arguments = (x, scores, torch.randn(4, 12, 8), torch.randn(4, 8, 6), *biases, 2, normalize, 1.7, 1.0, 3.0)
    torch.library.opcheck(ops.moe, arguments)


def test_a_token_computes_the_same_whatever_other_tokens_are_there():
    with torch.device("cpu"):
        model = Mixtral(CONFIG, 16).eval()
    randomise(model)
    moe = model.model.layers[0].block_sparse_moe
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))
    together = moe(x)
    alone = torch.stack([torch.stack([moe(token[None, None])[0, 0] for token in row]) for row in x])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5 * float(together.abs().max()))


def test_the_lowering_takes_the_grouped_operator_and_leaves_no_marker():
    with torch.device("meta"):
        graph = lower(export_universal(Mixtral(CONFIG, 16))).model.graph
    assert [node.op_type for node in graph if node.domain == DOMAIN] == []
    mixtures = [node for node in graph if (node.op_type, node.domain) == ("MoE", "com.microsoft")]
    assert len(mixtures) == 2
    assert mixtures[-1].inputs[0].shape[1] == ir.SymbolicDim("num_logits"), "the last layer sees what is asked for"


def test_rows_of_the_sources_take_turns():
    tensors = experts(4)
    checkpoint = stacked(Held(tensors | {"other": torch.zeros(2)}), STACKS)
    assert set(checkpoint.tensors) == {"other", "l.0.both"}
    both = checkpoint.load("l.0.both")
    assert both.shape == checkpoint.tensors["l.0.both"].shape == (4, 6, 5)
    for expert in range(4):
        assert torch.equal(both[expert, 0::2], tensors[f"l.0.{expert}.gate"])
        assert torch.equal(both[expert, 1::2], tensors[f"l.0.{expert}.up"])


def test_one_tensor_with_all_experts_serves_too():
    tensors = experts(4)
    whole = {
        f"l.0.{matrix}": torch.stack([tensors[f"l.0.{expert}.{matrix}"] for expert in range(4)])
        for matrix in ("gate", "up")
    }
    a, b = (stacked(Held(t), STACKS).load("l.0.both") for t in (tensors, whole))
    assert torch.equal(a, b)


def test_transposed_tensors_are_turned():
    stored = torch.from_numpy(np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    checkpoint = stacked(Held({"l.7.w": stored}), (Stack("l.{layer}.w", ("l.{layer}.w",), transposed=True),))
    assert checkpoint.tensors["l.7.w"].shape == (2, 4, 3)
    assert torch.equal(checkpoint.load("l.7.w"), stored.mT)


def test_a_checkpoint_without_experts_is_itself():
    held = Held({"other": torch.zeros(2)})
    assert stacked(held, STACKS) is held


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l.0.1.up": None}, r"missing: l\.0\.1\.up"),
        ({f"l.0.{expert}.up": None for expert in range(3)}, r"missing: l\.0\.\*\.up"),
        ({"l.0.2.up": None}, "differ in shape or number"),
        ({"l.0.1.up": torch.zeros(3, 4)}, "differ in shape or number"),
        ({"l.0.1.up": torch.zeros(3)}, "differ in shape or number"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_named(change, message):
    tensors = {name: tensor for name, tensor in (experts(3) | change).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        stacked(Held(tensors), STACKS)
