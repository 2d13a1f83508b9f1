"""Matching a checkpoint with a model, strictly: every tensor used, every parameter filled, every shape the same."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from .. import CheckpointError
from .checkpoints.base import Checkpoint
from .layers import BlockQuantizedWeight, QRmsNorm
from .quantization import BlockQuantized, Form, Gain

_LISTED = 8  # names of each kind in a message
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim", "num_attention_heads",
    "num_key_value_heads", "num_experts", "num_local_experts",
)  # fmt: skip
"""Of config.json: each is at most the largest dimension, or the number, of a checkpoint's tensors."""
_PARTS = ("codes", "scales", "offsets")  # of a block-quantised weight


def check_sizes(checkpoint: Checkpoint) -> None:
    """Refuse a configuration that speaks of far more than the weight files hold, before a model is built by it.

    `match_parameters` compares exactly; this keeps a damaged number from taking all memory until then.

    Raises:
        CheckpointError: it names the key.
    """
    count = len(checkpoint.tensors)
    largest = max([count, *(max(i.shape) for i in checkpoint.tensors.values() if i.shape and 0 not in i.shape)])
    for key, limit in {"num_hidden_layers": count, **dict.fromkeys(_SIZES, largest)}.items():
        value = checkpoint.config.get(key)
        if isinstance(value, int) and value > limit:
            raise CheckpointError(
                f"{checkpoint.source.name} does not fit its configuration: {key} is {value}, its weights allow {limit}"
            )


def match_parameters(model: nn.Module, checkpoint: Checkpoint, ignored: Sequence[str] = ()) -> dict[str, str]:
    """Say which checkpoint tensor fills which parameter.

    The codes, scales and offsets of a block-quantised module all come from its tensor `weight`. Parameters that the
    model shares between two names (a tied head) may be in the checkpoint once, or twice with the same bytes.

    Args:
        model: on any device, meta included.
        checkpoint: whose tensor names are the model's.
        ignored: `fnmatch` patterns of tensors that carry nothing.

    Returns:
        Parameter name -> tensor name, shared parameters under every name. A bias of zeros that no module asks for is
        passed over: it changes nothing.

    Raises:
        CheckpointError: lists what is missing, unexpected, mis-shaped and stored in another form.
    """
    wanted = wanted_tensors(model)
    matched: dict[str, str] = {}
    missing, misshaped, misformed = [], [], []
    for names in aliases(wanted):
        present = [name for name in names if name in checkpoint.tensors]
        if not present:
            missing.append(names[0])
            continue
        shape, form = wanted[names[0]].shape, wanted[names[0]].form
        for name in present:
            found = checkpoint.tensors[name]
            if found.shape != shape:
                misshaped.append(f"{name} {list(found.shape)}, expected {list(shape)}")
            elif form is not None and found.form != form:
                misformed.append(f"{name}, which is {found.stored}, expected {form}")
        matched |= {parameter: present[0] for name in names for parameter in wanted[name].parameters}
    unexpected = [
        name
        for name in checkpoint.tensors
        if name not in wanted
        and not any(fnmatch(name, pattern) for pattern in ignored)
        and not _is_zero_bias(name, wanted, checkpoint)
    ]
    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": misshaped,
        "of another form": misformed,
    }
    lines = [f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names]
    if lines:
        raise CheckpointError(f"{checkpoint.source.name} does not fit the model: " + "; ".join(lines))
    _compare_shared(checkpoint, aliases(wanted))
    return matched


def parameter_source(checkpoint: Checkpoint, names: Mapping[str, str]) -> Callable[[str], Tensor]:
    """A function: parameter name -> its value as the checkpoint has it: floats, or a part of a quantised weight.

    The parts of one weight that are asked for one after the other are read once.

    Args:
        checkpoint: where the values come from.
        names: parameter name -> tensor name, from `match_parameters`.
    """

    @functools.lru_cache(maxsize=1)
    def read(tensor: str) -> BlockQuantized | Gain | None:
        blocks = checkpoint.blocks(tensor)
        return blocks.as_gain() if blocks is not None and len(blocks.shape) == 1 else blocks

    def load(name: str) -> Tensor:
        tensor, part = names[name], name.rpartition(".")[2]
        if part not in _PARTS or tensor.rpartition(".")[2] == part:
            return checkpoint.load(tensor)
        value: Tensor | None = getattr(read(tensor), part, None)
        if value is None:
            raise CheckpointError(f"{checkpoint.source.name}: {tensor} has no {part}")
        return value

    return load


def load_weights(
    model: nn.Module, checkpoint: Checkpoint, ignored: Sequence[str] = (), dtype: torch.dtype = torch.float32
) -> None:
    """Fill every parameter of `model`, strictly; the model may lie on the meta device.

    Floating tensors become `dtype`; integer codes stay what they are.

    Raises:
        CheckpointError: see `match_parameters`.
    """
    shared: dict[int, nn.Parameter] = {}
    load = parameter_source(checkpoint, match_parameters(model, checkpoint, ignored))
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) not in shared:
            shared[id(parameter)] = nn.Parameter(with_floats(load(name), dtype), requires_grad=False)
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, shared[id(parameter)])


def with_floats(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A floating tensor as `dtype`; integer codes as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


@dataclass(frozen=True, slots=True)
class WantedTensor:
    """What a model asks a checkpoint for under one name.

    parameters: the names of those that it fills. shape: of the tensor. form: how it must be stored; None for floats.
    identity: the same for names that share their parameters.
    """

    parameters: tuple[str, ...]
    shape: tuple[int, ...]
    form: Form | None
    identity: int


def wanted_tensors(model: nn.Module) -> dict[str, WantedTensor]:
    """Every tensor that `model` needs, by name, in the order of its parameters."""
    wanted: dict[str, WantedTensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = dict(module.named_parameters(prefix, recurse=False, remove_duplicate=False))
        if isinstance(module, BlockQuantizedWeight | QRmsNorm):
            parts = tuple(name for name in own if name.rpartition(".")[2] in _PARTS)
            wanted[f"{prefix}.weight"] = WantedTensor(parts, module.shape, module.form, id(module.codes))
            own = {name: parameter for name, parameter in own.items() if name not in parts}
        wanted |= {name: WantedTensor((name,), tuple(p.shape), None, id(p)) for name, p in own.items()}
    return wanted


def aliases(wanted: Mapping[str, WantedTensor]) -> list[list[str]]:
    """The names, those of one tensor together."""
    groups: dict[int, list[str]] = {}
    for name, tensor in wanted.items():
        groups.setdefault(tensor.identity, []).append(name)
    return list(groups.values())


def _compare_shared(checkpoint: Checkpoint, groups: Iterable[Sequence[str]]) -> None:
    for names in groups:
        first, *others = [name for name in names if name in checkpoint.tensors]
        for other in others:
            if not _same_bytes(checkpoint.load(first), checkpoint.load(other)):
                raise CheckpointError(
                    f"{checkpoint.source.name}: the configuration ties {first} and {other}, but their weights differ"
                )


def _is_zero_bias(name: str, wanted: Mapping[str, WantedTensor], checkpoint: Checkpoint) -> bool:
    """Old quantisers write a bias of zeros for linears that have none; it changes nothing."""
    module = name.removesuffix(".bias")
    return module != name and f"{module}.weight" in wanted and not checkpoint.load(name).any()


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    """Also where a NaN is in both; `torch.equal` would deny it."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
