"""Experts' weights as the modules have them, stacked and interleaved, of a checkpoint that has each by itself.

A view: tensors are put together when they are loaded, and everything that reads checkpoints reads it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .. import CheckpointError
from .architecture import Stack
from .checkpoints.base import Checkpoint, CheckpointSource, TensorInfo
from .quantization import BlockQuantized


@dataclass(frozen=True, slots=True)
class _Source:
    """One source in one layer: the tensors of its experts in order, or (whole) the one that has all in it."""

    names: tuple[str, ...]
    whole: bool


@dataclass(frozen=True, slots=True)
class _Recipe:
    """What one parameter is made of."""

    sources: tuple[_Source, ...]
    transposed: bool


def stacked(checkpoint: Checkpoint, stacks: Sequence[Stack]) -> Checkpoint:
    """The checkpoint with the parameters of `stacks` in place of the tensors that they are made of.

    Raises:
        CheckpointError: an expert or a matrix is missing, or experts differ in shape or number.
    """
    recipes: dict[str, _Recipe] = {}
    for stack in stacks:
        found = [_find(checkpoint, source) for source in stack.sources]
        for layer in sorted({layer for layers in found for layer in layers}):
            for source, layers in zip(stack.sources, found, strict=True):
                if layer not in layers:
                    raise _missing(checkpoint, source.format(layer=layer, expert="*"))
            sources = tuple(layers[layer] for layers in found)
            recipes[stack.parameter.format(layer=layer)] = _Recipe(sources, stack.transposed)
    return StackedCheckpoint(checkpoint, recipes) if recipes else checkpoint


class StackedCheckpoint:
    """See `Checkpoint`; made by `stacked`."""

    def __init__(self, checkpoint: Checkpoint, recipes: Mapping[str, _Recipe]) -> None:
        self._checkpoint = checkpoint
        self._recipes = recipes
        self.kind: Literal["normal", "gguf"] = checkpoint.kind
        self.source: CheckpointSource = checkpoint.source
        self.config: dict[str, Any] = checkpoint.config
        self.files: Mapping[str, bytes] = checkpoint.files
        used = {name for recipe in recipes.values() for source in recipe.sources for name in source.names}
        kept = {name: info for name, info in checkpoint.tensors.items() if name not in used}
        made = {name: self._info(name, recipe) for name, recipe in recipes.items()}
        self.tensors: Mapping[str, TensorInfo] = kept | made

    def load(self, name: str) -> Tensor:
        """See `Checkpoint`."""
        recipe = self._recipes.get(name)
        if recipe is None:
            return self._checkpoint.load(name)
        matrices = [self._experts(source) for source in recipe.sources]
        if recipe.transposed:
            matrices = [matrix.mT for matrix in matrices]
        return torch.stack(matrices, 2).flatten(1, 2) if len(matrices) > 1 else matrices[0]

    def blocks(self, name: str) -> BlockQuantized | None:
        """See `Checkpoint`; what is stacked is had in floats only."""
        return None if name in self._recipes else self._checkpoint.blocks(name)

    def sha256(self) -> dict[str, str]:
        """See `Checkpoint`."""
        return self._checkpoint.sha256()

    def _experts(self, source: _Source) -> Tensor:
        """(E, N, …)."""
        tensors = [self._checkpoint.load(name) for name in source.names]
        return tensors[0] if source.whole else torch.stack(tensors)

    def _info(self, name: str, recipe: _Recipe) -> TensorInfo:
        shapes: set[tuple[int, ...]] = set()
        for source in recipe.sources:
            infos = [self._checkpoint.tensors[one] for one in source.names]
            shapes |= {info.shape if source.whole else (len(infos), *info.shape) for info in infos}
        possible = (3,) if recipe.transposed else (2, 3)
        if len(shapes) != 1 or not all(len(shape) in possible for shape in shapes):
            raise CheckpointError(f"{self.source.name}: the experts that make up {name} differ in shape or number")
        experts, *matrix = shapes.pop()
        rows, *columns = reversed(matrix) if recipe.transposed else matrix
        return TensorInfo((experts, len(recipe.sources) * rows, *columns), infos[0].dtype, infos[0].stored)


def _find(checkpoint: Checkpoint, source: str) -> dict[int, _Source]:
    """Layer -> the tensors of one source."""
    pattern = re.escape(source).replace(r"\{layer\}", r"(?P<layer>\d+)")
    pattern = pattern.replace(r"\{expert\}\.", r"(?:(?P<expert>\d+)\.)?")
    experts: dict[int, dict[int, str]] = {}
    found: dict[int, _Source] = {}
    for name in checkpoint.tensors:
        if match := re.fullmatch(pattern, name):
            layer, expert = int(match["layer"]), match.groupdict().get("expert")
            if expert is None:
                found[layer] = _Source((name,), whole=True)
            else:
                experts.setdefault(layer, {})[int(expert)] = name
    for layer, names in experts.items():
        for expert in range(len(names)):
            if expert not in names:
                raise _missing(checkpoint, source.format(layer=layer, expert=expert))
        found[layer] = _Source(tuple(names[expert] for expert in sorted(names)), whole=False)
    return found


def _missing(checkpoint: Checkpoint, name: str) -> CheckpointError:
    return CheckpointError(f"{checkpoint.source.name} does not fit the model: 1 missing: {name}")
