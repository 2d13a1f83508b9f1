"""The last layer's MLP is computed for the tokens that are asked for, and asking changes no number."""

import numpy as np
import onnx
import pytest
from support import RELATIVE_TOLERANCE, export_graphs, open_engine, randomise

from zonda.export.lower import onnxruntime as lowering
from zonda.export.onnx_files import LOWERED
from zonda.models.llama import Llama, LlamaConfig

CONFIG = LlamaConfig.read(
    {
        "vocab_size": 61,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
    }
)
IDS = np.random.default_rng(0).integers(0, 61, (3, 7))
LENS = np.array([7, 0, 4], np.int32)
OFFSETS = np.zeros(3, np.int32)


def engine(directory, early: bool, monkeypatch):
    directory.mkdir()
    if not early:
        monkeypatch.setattr(lowering, "gather_early", lambda _: None)
    model = Llama(CONFIG, 64).eval()
    randomise(model)
    module = export_graphs(directory, lambda rows: Llama(CONFIG, rows), dict(model.state_dict()).__getitem__, 64)
    monkeypatch.undo()
    return open_engine(directory, module, 61, capacity=32)


@pytest.mark.parametrize("positions", [[[6], [0], [3]], [[2, 6, 0], [0, 1, 2], [3, 3, 1]], [list(range(7))] * 3])
def test_turning_it_off_changes_no_logit(tmp_path, monkeypatch, positions):
    found = []
    for early in (True, False):
        one = engine(tmp_path / str(early), early, monkeypatch)
        asked = np.array(positions)
        logits = one.step(one.allocate(3), 0, IDS, OFFSETS, LENS, asked)
        found.append(logits[asked < LENS[:, None]])  # what padding and idle rows give is nobody's
    assert np.abs(found[0] - found[1]).max() <= RELATIVE_TOLERANCE * np.abs(found[1]).max()


def test_only_keys_values_and_attention_of_the_last_layer_see_every_token(tmp_path, monkeypatch):
    engine(tmp_path / "graph", True, monkeypatch)
    nodes = onnx.load(tmp_path / "graph" / LOWERED, load_external_data=False).graph.node
    kinds = [node.op_type for node in nodes]
    last_attention = max(i for i, kind in enumerate(kinds) if kind == "GroupQueryAttention")
    gathers = [i for i, kind in enumerate(kinds) if kind == "GatherElements"]
    products = [i for i, kind in enumerate(kinds) if kind == "FusedMatMul" and i > last_attention]
    assert len(gathers) == 2, "of the attention's result and of the residual stream"
    assert len(products) == 5, "o, gate, up, down and the head"
    assert last_attention < min(gathers) < max(gathers) < min(products)
