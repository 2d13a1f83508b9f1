"""Weights are compared byte by byte, in parts, and the place of a difference is that of the whole tensor."""

import numpy as np
import pytest
import torch
from support import TWO_LAYERS, export_graphs, randomise

from zonda import ParityError
from zonda.export import weight_proof
from zonda.export.onnx_files import WEIGHTS
from zonda.export.weight_proof import WrittenWeights
from zonda.models.llama import Llama

NAME = "model.layers.1.mlp.down_proj.weight"  # (64, 96)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """(folder, state, packs) of a small export; parts of 1000 values, so that a tensor has several."""
    monkeypatch.setattr(weight_proof, "_TOGETHER", 1000)
    model = Llama(TWO_LAYERS, 32).eval()
    randomise(model)
    state = dict(model.state_dict()) | dict(model.named_buffers(remove_duplicate=False))
    export_graphs(tmp_path, lambda rows: Llama(TWO_LAYERS, rows), state.__getitem__, 32)
    prefixes = [f"model.layers.{layer}.self_attn" for layer in range(2)]
    packs = {f"{p}.q_proj.weight.packed": tuple(f"{p}.{n}_proj.weight" for n in "qkv") for p in prefixes}
    return tmp_path, state, packs


def test_what_was_written_passes_and_is_counted(written):
    folder, state, packs = written
    report = WrittenWeights(folder, packs).finish(state.__getitem__)
    assert report.bytes > 4 * sum(p.numel() for n, p in state.items() if "layers" in n and n.endswith("weight"))
    assert report.tensors > 18


@pytest.mark.parametrize("value", [0, 999, 1000, 6143])
def test_a_changed_value_is_named_by_its_place(written, value):
    folder, state, packs = written
    changed = state[NAME].clone()
    changed.view(-1)[value] += 0.5
    row, column = divmod(value, 96)
    with pytest.raises(
        ParityError, match=rf"{NAME} is not the checkpoint's: 1 of [\d,]+ .* first at \[{row}, {column}\]"
    ):
        WrittenWeights(folder, packs).check(NAME, changed)


def test_a_negative_zero_is_another_byte(written):
    folder, state, packs = written
    file = np.memmap(folder / WEIGHTS, np.float32, "r+")
    place = WrittenWeights(folder, packs)._places[NAME][0] // 4
    file[place] = -0.0
    file.flush()
    zero = state[NAME].clone()
    zero.view(-1)[0] = 0.0
    with pytest.raises(ParityError, match=r"1 of 1,000 values differ, first at \[0, 0\]: -0 instead of 0"):
        WrittenWeights(folder, packs).check(NAME, zero)


def test_a_tensor_of_another_size_does_not_pass(written):
    folder, state, packs = written
    with pytest.raises(ParityError, match="bytes"):
        WrittenWeights(folder, packs).check(NAME, state[NAME][:-1])
    with pytest.raises(ParityError, match="cut off"):
        WrittenWeights(folder, packs).check(NAME, torch.cat([state[NAME], state[NAME]]))


def test_members_of_a_pack_must_lie_side_by_side(written):
    folder, _, packs = written
    swapped = {name: (q, v, k) for name, (q, k, v) in packs.items()}
    with pytest.raises(ParityError, match="does not point at the bytes"):
        WrittenWeights(folder, swapped)
