"""Module surgery: what a checkpoint holds in blocks becomes `QLinear`, `QEmbedding` or `QRmsNorm`.

Architecture files are written with `Linear`, `Embedding` and `RmsNorm` and know nothing of it.
"""

import math
from collections.abc import Iterator, Mapping

from torch import nn

from .checkpoints.base import FLOATS, Checkpoint
from .layers import BlockQuantizedWeight, Embedding, Linear, QEmbedding, QLinear, QRmsNorm, RmsNorm
from .loading import aliases, wanted_tensors
from .quantization import Form

_CLASSES = {"embedding": (Embedding, QEmbedding), "linear": (Linear, QLinear), "norm": (RmsNorm, QRmsNorm)}


def quantized_forms(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Form]:
    """Say which weights of `model` the checkpoint holds in blocks, and how.

    A weight that modules share (a tied head) is named under each of them, and only if all can hold it in blocks.

    Args:
        model: as its architecture builds it, on any device.
        checkpoint: whose tensor names are the model's.

    Returns:
        Parameter name (`model.layers.0.mlp.up_proj.weight`) -> form.
    """
    allowed = {f"{name}.weight" for name, _ in replaceable(model)}
    forms: dict[str, Form] = {}
    for names in aliases(wanted_tensors(model)):
        found = {checkpoint.tensors[name].form for name in names if name in checkpoint.tensors}
        if len(found) == 1 and allowed.issuperset(names):
            (form,) = found
            forms |= {} if form is None else dict.fromkeys(names, form)
    return forms


def quantize_modules(model: nn.Module, forms: Mapping[str, Form]) -> None:
    """Replace the modules whose weights `forms` names, in place; new parameters are unfilled, on the old ones' device.

    Modules that shared a weight share its codes, scales and offsets.

    Args:
        model: usually on the meta device.
        forms: from `quantized_forms`.

    Raises:
        ValueError: a name in `forms` is no weight of a `Linear` or `Embedding`, or its rows do not divide into blocks.
    """
    left = dict(forms)
    shared: dict[int, BlockQuantizedWeight] = {}
    for name, module in list(replaceable(model)):
        form = left.pop(f"{name}.weight", None)
        if form is None:
            continue
        if module.weight.shape[1] % form.block_size:
            raise ValueError(f"{name}: rows of {module.weight.shape[1]} do not divide into blocks of {form.block_size}")
        new = _quantized(module, form)
        first = shared.setdefault(id(module.weight), new)
        new.codes, new.scales, new.offsets = first.codes, first.scales, first.offsets
        model.set_submodule(name, new)
    if left:
        raise ValueError(f"not the weights of a Linear or Embedding: {', '.join(left)}")


def is_quantized(model: nn.Module) -> bool:
    """Whether any weight is held in blocks."""
    return any(isinstance(module, BlockQuantizedWeight) for module in model.modules())


def quantize_norms(model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Replace each `RmsNorm` whose gain the checkpoint holds in 8-bit blocks by a `QRmsNorm`, in place and unfilled.

    Args:
        model: usually on the meta device.
        checkpoint: whose tensor names are the model's.

    Returns:
        Gains that are in blocks too but stay in floats: what is multiplied is a sum (Gemma's `offset + weight`), or
        their form is none of a norm's.
    """
    kept = []
    for name, module in list(model.named_modules()):
        stored = checkpoint.tensors.get(f"{name}.weight")
        if not isinstance(module, RmsNorm) or stored is None or stored.form is None:
            continue
        if type(module) is not RmsNorm or not stored.form.fits_norms:
            kept.append(f"{name}.weight")
            continue
        with module.weight.device:
            model.set_submodule(name, QRmsNorm(module.weight.shape[0], module.eps, stored.form.block_size))
    return kept


def count_weights(model: nn.Module) -> int:
    """The model's weights, shared ones once; a code counts for one, scales and offsets for none."""
    counts: dict[int, int] = {}
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, BlockQuantizedWeight | QRmsNorm):
            counts[id(module.codes)] = math.prod(module.shape)
            own = {name: parameter for name, parameter in own.items() if name == "bias"}
        counts |= {id(parameter): parameter.numel() for parameter in own.values()}
    return sum(counts.values())


def tensor_classes(model: nn.Module) -> dict[str, str]:
    """What each class of weights is held in: `{"embedding": "8 bits, blocks of 32", "linear": …, "norm": …}`."""
    held: dict[str, set[str]] = {name: set() for name in _CLASSES}
    for module in model.modules():
        for name, types in _CLASSES.items():
            if isinstance(module, types):
                held[name].add(str(module.form) if isinstance(module, BlockQuantizedWeight | QRmsNorm) else "float32")
    return {name: "; ".join(sorted(forms)) for name, forms in held.items() if forms}


def dequantized_types(model: nn.Module, checkpoint: Checkpoint) -> str:
    """The stored types of weights that the checkpoint quantises and `model` holds in floats: `IQ3_S, MXFP4`, or none.

    Args:
        model: after `quantize_modules`, if it is called.
        checkpoint: whose tensor names are the model's.
    """
    wanted = {name for name, tensor in wanted_tensors(model).items() if tensor.form is None}
    stored = {info.stored for name, info in checkpoint.tensors.items() if name in wanted}
    return ", ".join(sorted(stored.difference(FLOATS)))


def replaceable(model: nn.Module) -> Iterator[tuple[str, Linear | Embedding]]:
    """Linears and embeddings by name, shared ones under each; not subclasses, which may compute something else."""
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) in (Linear, Embedding):
            yield name, module


def _quantized(module: Linear | Embedding, form: Form) -> QLinear | QEmbedding:
    rows, columns = module.weight.shape
    with module.weight.device:
        if isinstance(module, Embedding):
            return QEmbedding(rows, columns, form)
        new = QLinear(columns, rows, form)
    new.bias = module.bias
    return new
