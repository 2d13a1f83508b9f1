"""OpenVINO's model of a Hugging Face folder, in float32: `python -m benchmarks.openvino_model FOLDER OUT`.

Runs in the peers' environment. It makes what optimum-intel would make, whose releases refuse the transformers here: the
graph that torch traces, its KV cache turned into states that a step reorders by `beam_idx`, and the tokenizer.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from openvino._offline_transformations import apply_make_stateful_transformation
from openvino_tokenizers import convert_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

INPUTS = ("input_ids", "attention_mask", "position_ids")


class FlatCache(torch.nn.Module):
    """A causal model whose cache is a list of tensors: key and value of each layer, (B, Hkv, P, D)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Logits (B, S, V), and the cache with the S new tokens."""
        cache = DynamicCache(config=self.model.config)
        for layer, key, value in zip(cache.layers, past[::2], past[1::2], strict=True):
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value
        found = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache
        )
        return found.logits, *(part for layer in cache.layers for part in (layer.keys, layer.values))


def convert(folder: Path, out: Path) -> None:
    """Write model and tokenizer as openvino-genai reads them."""
    torch_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    config = torch_model.config
    heads, layers = config.num_key_value_heads, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rows, new, cached = 2, 3, 5  # of the example; all are dynamic in the result
    example = (
        torch.ones(rows, new, dtype=torch.int64),
        torch.ones(rows, cached + new, dtype=torch.int64),
        torch.arange(cached, cached + new)[None].repeat(rows, 1),
        *(torch.zeros(rows, heads, cached, head_dim) for _ in range(2 * layers)),
    )
    with torch.no_grad():
        model = ov.convert_model(FlatCache(torch_model), example_input=example)
    _make_stateful(model, heads, head_dim)
    ov.save_model(model, out / "openvino_model.xml", compress_to_fp16=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(out)
    config.save_pretrained(out)
    for part, name in zip(
        convert_tokenizer(tokenizer, with_detokenizer=True), ("tokenizer", "detokenizer"), strict=True
    ):
        ov.save_model(part, out / f"openvino_{name}.xml")


def _make_stateful(model: ov.Model, heads: int, head_dim: int) -> None:
    """Turn the cache's inputs and outputs into states, empty for a batch of as many rows as `input_ids` has."""
    beams = ops.parameter(ov.PartialShape([-1]), ov.Type.i32, name="beam_idx")
    beams.output(0).set_names({"beam_idx"})
    names = {}
    pasts, presents = model.inputs[len(INPUTS) :], model.outputs[1:]
    for number, (past, present) in enumerate(zip(pasts, presents, strict=True)):
        names[f"past.{number}"] = f"present.{number}"
        past.set_names({f"past.{number}"})
        present.set_names({f"present.{number}"})
        past.get_node().set_partial_shape(ov.PartialShape([-1, heads, -1, head_dim]))
        readers = past.get_target_inputs()
        reordered = ops.gather(past, beams, ops.constant(np.int64(0)))
        for reader in readers:
            reader.replace_source_output(reordered.output(0))
    model.outputs[0].set_names({"logits"})
    model.add_parameters([beams])
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, names)
    shape_of_ids = ops.shape_of(model.input("input_ids"), output_type="i64")
    batch = ops.gather(shape_of_ids, ops.constant(np.array([0])), ops.constant(0))
    empty = ops.concat([batch, ops.constant(np.array([heads, 0, head_dim]))], axis=0)
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([ops.broadcast(ops.constant(np.float32(0)), empty)])
    model.validate_nodes_and_infer_types()


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
