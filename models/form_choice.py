"""`--quant`: which weights of a checkpoint of floats are held in blocks, and of which form.

What stays in floats: norms, biases, stacked experts, the routers that choose them, and rows that do not divide into
blocks. Knows nothing of how a block is found.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from .. import BuildError
from . import block_search
from .checkpoints.base import Checkpoint
from .layers import Embedding, Experts
from .loading import aliases, wanted_tensors
from .quantization import Form
from .quantize import replaceable

_BLOCK = 32
_INT8 = Form(8, _BLOCK, offsets=False)
_INT4 = Form(4, _BLOCK, offsets=True)
_HEAD = "lm_head.weight"
_SENSITIVE = (("q_proj", "k_proj", "v_proj", "qkv_proj"), ("down_proj", "fc2", "c_proj"))
"""Last names of linears that gain most from 8 bits, the best first; within a module they stay of one form, so that
lowering still joins them. Of the KL divergence that 4 bits cost SmolLM2-135M, 8 bits in attention's inputs take away
43 % for 8 % more bytes, in MLPs' outputs 27 % for 12 %, in their inputs 24 % for 25 %, in attention's outputs 6 % for
5 %. llama.cpp raises values and MLPs' outputs, too (src/llama-quant.cpp).
"""
_BUDGET = 1 / 8
"""How many bytes more, as a share of the linears in 4 bits, may go into raising some of them."""
_SAMPLE = 128  # rows of a weight that its error is measured on


@dataclass(frozen=True, slots=True)
class Choice:
    """forms: tensor name -> how to hold it, a shared weight under each name. raised: weights of `int4` given 8 bits.

    weights: how many there are, shared ones once.
    """

    quant: str
    forms: Mapping[str, Form]
    weights: int
    raised: int = 0


def choose_forms(model: nn.Module, checkpoint: Checkpoint, quant: str) -> Choice:
    """Which weights of `model` are held in blocks, and how.

    int8: all in 8 bits. int4: linears in 4 bits with offsets; in 8 bits embedding and head, which are often one, and
    the most sensitive linears that a budget of bytes allows. Where a class of linears does not fit into it as a whole,
    those with the largest weighted errors of 4 bits come first.

    Args:
        model: as its architecture builds it, on any device.
        checkpoint: whose tensor names are the model's; samples of its weights are read for `int4`.
        quant: `int8` or `int4`.

    Raises:
        BuildError: the checkpoint has such a weight in blocks already, or has none that could be.
    """
    weights = list(_weights(model, checkpoint))
    stored = [weight.stored for weight in weights if checkpoint.tensors[weight.stored].form is not None]
    if stored:
        raise BuildError(
            f"--quant is for weights in floats, but {checkpoint.source.name} ({checkpoint.source.format}) has "
            f"{len(stored)} of its {len(weights)} in blocks already, the first {stored[0]}: build it without --quant"
        )
    if not weights:
        raise BuildError(
            f"--quant {quant}: {checkpoint.source.name} has no linear or embedding whose rows divide into blocks of "
            f"{_BLOCK}; build it without --quant"
        )
    narrow = [weight for weight in weights if quant == "int4" and not weight.outer]
    raised = _raised(narrow, checkpoint)
    forms = {
        name: _INT4 if weight in narrow and weight not in raised else _INT8
        for weight in weights
        for name in weight.names
    }
    return Choice(quant, forms, len(weights), len(raised))


@dataclass(frozen=True, slots=True)
class _Weight:
    """names: of all parameters that share it. stored: the one that the checkpoint has. outer: embedding or head."""

    names: tuple[str, ...]
    stored: str
    shape: tuple[int, ...]
    outer: bool

    @property
    def module(self) -> tuple[str, str]:
        """`model.layers.0.self_attn`, `q_proj`."""
        parent, _, name = self.stored.removesuffix(".weight").rpartition(".")
        return parent, name

    def size(self, form: Form) -> int:
        """Bytes of its codes, scales and offsets."""
        return math.prod(self.shape) * form.bits // 8 + math.prod(self.shape) // _BLOCK * 4 * (1 + form.offsets)


def _weights(model: nn.Module, checkpoint: Checkpoint) -> Iterator[_Weight]:
    """What a `QLinear` or `QEmbedding` can hold and the checkpoint has."""
    modules = {f"{name}.weight": module for name, module in replaceable(model)}
    routers = {
        f"{name}.{child}.weight"
        for name, module in model.named_modules()
        if any(isinstance(part, Experts) for part in module.children())
        for child, _ in module.named_children()
    }
    wanted = wanted_tensors(model)
    for names in aliases(wanted):
        shape, stored = wanted[names[0]].shape, [name for name in names if name in checkpoint.tensors]
        if stored and (modules.keys() - routers).issuperset(names) and shape[1] % _BLOCK == 0:
            outer = any(isinstance(modules[name], Embedding) or name == _HEAD for name in names)
            yield _Weight(tuple(names), stored[0], shape, outer)


def _raised(narrow: Sequence[_Weight], checkpoint: Checkpoint) -> set[_Weight]:
    """Which of the linears in 4 bits get 8."""
    left = _BUDGET * sum(weight.size(_INT4) for weight in narrow)
    raised: set[_Weight] = set()
    for kinds in _SENSITIVE:
        groups: dict[str, list[_Weight]] = {}
        for weight in narrow:
            parent, kind = weight.module
            if kind in kinds:
                groups.setdefault(parent, []).append(weight)
        costs = {parent: sum(w.size(_INT8) - w.size(_INT4) for w in group) for parent, group in groups.items()}
        order = list(groups)
        if sum(costs.values()) > left:
            errors = {parent: _error(group, checkpoint) for parent, group in groups.items()}
            order.sort(key=lambda parent: -errors[parent])
        for parent in order:
            if costs[parent] <= left:
                left -= costs[parent]
                raised.update(groups[parent])
    return raised


def _error(group: Sequence[_Weight], checkpoint: Checkpoint) -> float:
    """The largest relative error of 4 bits, each on some rows from all over the weight."""
    errors = []
    for weight in group:
        rows = checkpoint.load(weight.stored)[:: max(1, weight.shape[0] // _SAMPLE)]
        errors.append(block_search.relative_error(rows, block_search.quantize(rows, _INT4)))
    return max(errors)
