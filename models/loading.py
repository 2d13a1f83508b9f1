"""Matching a checkpoint with a model, strictly: every tensor used, every parameter filled, every shape the same."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from .. import CheckpointError
from .checkpoints.base import Checkpoint

_LISTED = 8  # names of each kind in a message


def match_parameters(model: nn.Module, checkpoint: Checkpoint, ignored: Sequence[str] = ()) -> dict[str, str]:
    """Say which checkpoint tensor fills which parameter.

    Parameters that the model shares between two names (a tied head) may be in the checkpoint once, or twice with the
    same bytes.

    Args:
        model: on any device, meta included.
        checkpoint: whose tensor names are the model's.
        ignored: `fnmatch` patterns of tensors that carry nothing.

    Returns:
        Parameter name -> tensor name, shared parameters under every name.

    Raises:
        CheckpointError: lists what is missing, unexpected and mis-shaped.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    aliases: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        aliases.setdefault(id(parameter), []).append(name)
    matched: dict[str, str] = {}
    missing, misshaped = [], []
    for names in aliases.values():
        present = [name for name in names if name in checkpoint.tensors]
        if not present:
            missing.append(names[0])
            continue
        wanted = tuple(parameters[names[0]].shape)
        for name in present:
            if checkpoint.tensors[name].shape != wanted:
                misshaped.append(f"{name} {list(checkpoint.tensors[name].shape)}, expected {list(wanted)}")
        matched |= dict.fromkeys(names, present[0])
    unexpected = [
        name
        for name in checkpoint.tensors
        if name not in parameters and not any(fnmatch(name, pattern) for pattern in ignored)
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    lines = [f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names]
    if lines:
        raise CheckpointError(f"{checkpoint.source.name} does not fit the model: " + "; ".join(lines))
    _compare_shared(checkpoint, aliases)
    return matched


def load_weights(
    model: nn.Module, checkpoint: Checkpoint, ignored: Sequence[str] = (), dtype: torch.dtype = torch.float32
) -> None:
    """Fill every parameter of `model`, strictly; the model may lie on the meta device.

    Floating tensors become `dtype`; integer codes stay what they are.

    Raises:
        CheckpointError: see `match_parameters`.
    """
    shared: dict[int, nn.Parameter] = {}
    names = match_parameters(model, checkpoint, ignored)
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) not in shared:
            tensor = checkpoint.load(names[name])
            floats = tensor.to(dtype) if tensor.is_floating_point() else tensor
            shared[id(parameter)] = nn.Parameter(floats, requires_grad=False)
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, shared[id(parameter)])


def _compare_shared(checkpoint: Checkpoint, aliases: Mapping[int, Sequence[str]]) -> None:
    for names in aliases.values():
        first, *others = [name for name in names if name in checkpoint.tensors]
        for other in others:
            if not _same_bytes(checkpoint.load(first), checkpoint.load(other)):
                raise CheckpointError(
                    f"{checkpoint.source.name}: the configuration ties {first} and {other}, but their weights differ"
                )


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    """Also where a NaN is in both; `torch.equal` would deny it."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
