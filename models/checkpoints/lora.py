"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685) in PEFT's folders, merged into the weights of a checkpoint.

    W' = W + sum over adapters of scale * factor * B @ A        in float32

with the factor alpha / r, or alpha / sqrt(r) (rsLoRA: Kalajdzievski 2023, arXiv:2312.03732). A view: a weight is merged
when it is loaded, so memory holds one at a time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ... import CheckpointError
from ..quantization import BlockQuantized
from .base import AdapterSource, Checkpoint, CheckpointView, files_sha256
from .folder import inside, read_json
from .lora_config import LoraConfig, ends_with
from .safetensors import SafetensorsFile

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LINEAR = (".lora_A.weight", ".lora_B.weight")
_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")


@dataclass(frozen=True, slots=True)
class _Product:
    """`factor * left @ right`, to be added to a weight; the names of its tensors in `file`."""

    file: SafetensorsFile
    left: str
    right: str
    transposed: bool
    factor: float

    def add_to(self, weight: Tensor) -> None:
        left, right = self.file.load(self.left).float(), self.file.load(self.right).float()
        if self.transposed:
            left, right = right.T, left.T
        weight.addmm_(left, right, alpha=self.factor)


@dataclass(slots=True)
class _Change:
    """What becomes of one weight: first taken from another file, if any, then products added."""

    taken: tuple[SafetensorsFile, str] | None = None
    products: list[_Product] = field(default_factory=list)


def parse_lora(text: str) -> tuple[Path, float]:
    """The folder and the scale of `PATH[:scale]`; the scale is 1 if it is not given.

    Raises:
        CheckpointError: what follows the colon is no number.
    """
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise CheckpointError(f"--lora {text}: there is no such folder, and {scale!r} is no scale; write PATH[:scale]")
    return Path(path), value


def merge_adapters(checkpoint: Checkpoint, adapters: Sequence[tuple[Path, float]]) -> Checkpoint:
    """The checkpoint with adapters merged into its weights.

    What they change is float32, also where the checkpoint has it quantised; `source.format` then says so.

    Args:
        checkpoint: with the names that the adapters were trained with: before experts are stacked.
        adapters: each a folder of PEFT and a scale.

    Raises:
        CheckpointError: a folder is no adapter, or one of its tensors does not fit the checkpoint or the configuration.
        ConfigError: an adapter's configuration has an option that is not merged.
    """
    if not adapters:
        return checkpoint
    changes: dict[str, _Change] = {}
    sources = []
    for path, scale in adapters:
        try:
            sources.append(_Adapter(path, scale).add_to(changes, checkpoint))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    return MergedCheckpoint(checkpoint, changes, sources)


class MergedCheckpoint(CheckpointView):
    """See `Checkpoint`; made by `merge_adapters`."""

    def __init__(self, checkpoint: Checkpoint, changes: dict[str, _Change], adapters: Sequence[AdapterSource]) -> None:
        self._changes = changes
        changed = {name: replace(checkpoint.tensors[name], dtype=torch.float32, form=None) for name in changes}
        held = sum(checkpoint.tensors[name].form is not None for name in changes)
        source = checkpoint.source
        note = f", {held} of its weights dequantised to merge adapters" if held else ""
        super().__init__(
            checkpoint,
            {**checkpoint.tensors, **changed},
            source=replace(source, format=source.format + note, adapters=(*source.adapters, *adapters)),
        )

    def load(self, name: str) -> Tensor:
        """See `Checkpoint`."""
        change = self._changes.get(name)
        if change is None:
            return super().load(name)
        base = super().load(name) if change.taken is None else change.taken[0].load(change.taken[1])
        weight = base.to(torch.float32, copy=True)
        for product in change.products:
            product.add_to(weight)
        return weight

    def blocks(self, name: str) -> BlockQuantized | None:
        """See `Checkpoint`."""
        return None if name in self._changes else super().blocks(name)


class _Adapter:
    """One folder: its configuration, and which of its tensors change which weights."""

    def __init__(self, path: Path, scale: float) -> None:
        if not (path / _CONFIG).is_file():
            raise CheckpointError(f"{path} has no {_CONFIG}, so it is no adapter of PEFT")
        if not (path / _WEIGHTS).is_file():
            raise CheckpointError(
                f"{path} has no {_WEIGHTS}; a pickle (adapter_model.bin) is not read, because loading it runs the code "
                "in it: save the adapter again with PEFT, in an environment you trust"
            )
        self._path, self._scale = path, scale
        self._config = LoraConfig.read(read_json(path, _CONFIG), str(path / _CONFIG))
        self._file = SafetensorsFile(inside(path, _WEIGHTS))

    def add_to(self, changes: dict[str, _Change], checkpoint: Checkpoint) -> AdapterSource:
        """Check every tensor against the checkpoint, and enter what it changes."""
        pairs, whole = self._sort()
        for module, names in pairs.items():
            self._add_product(changes, checkpoint, module, names)
        for name, tensor in whole.items():
            self._take(changes, checkpoint, name, tensor)
        self._check_targets(set(pairs), set(whole), checkpoint)
        tables = [name for name in changes if name.endswith("embed_tokens.weight")]
        if tables and "lm_head.weight" not in checkpoint.tensors:
            raise self._error(f"changes {tables[0]}, which the head shares: it would change too")
        digests = files_sha256([self._path / _CONFIG, self._path / _WEIGHTS])
        return AdapterSource(self._path.resolve().name, self._scale, digests)

    def _sort(self) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        """Modules with factors -> their tensors by suffix, and tensors stored whole by the checkpoint's name."""
        pairs: dict[str, dict[str, str]] = {}
        whole: dict[str, str] = {}
        for tensor, info in self._file.tensors.items():
            if not tensor.startswith(_PREFIX) or not info.dtype.is_floating_point:
                raise self._error(f"has {tensor} of type {info.stored}; a name begins with {_PREFIX}, and has floats")
            name = tensor.removeprefix(_PREFIX)
            suffix = next((s for s in (*_LINEAR, *_EMBEDDING) if name.endswith(s)), None)
            if suffix is not None:
                pairs.setdefault(name.removesuffix(suffix), {})[suffix] = tensor
            elif ".lora_" in name:
                raise self._error(f"has the tensor {tensor}, which is neither A nor B of a linear or an embedding")
            else:
                name = name.replace(".modules_to_save.", ".").replace(".base_layer.", ".")
                if name in whole:
                    raise self._error(f"has {whole[name]} and {tensor}, which are the same tensor")
                whole[name] = tensor
        if not pairs and not whole:
            raise self._error("holds no tensors")
        return pairs, whole

    def _add_product(
        self, changes: dict[str, _Change], checkpoint: Checkpoint, module: str, names: dict[str, str]
    ) -> None:
        kinds = [kind for kind in (_LINEAR, _EMBEDDING) if names.keys() == set(kind)]
        if not kinds:
            raise self._error(f"has {', '.join(names.values())} alone; A and B belong together")
        (a, b), weight = kinds[0], f"{module}.weight"
        base = checkpoint.tensors.get(weight)
        if base is None:
            raise self._error(f"adapts {module}, which the checkpoint has no weight for")
        rank, embedding = self._config.rank_of(module), kinds[0] is _EMBEDDING
        first, second = self._file.tensors[names[a]].shape, self._file.tensors[names[b]].shape
        wanted = base.shape[::-1] if embedding else base.shape
        if len(wanted) != 2 or first != (rank, wanted[1]) or second != (wanted[0], rank):
            raise self._error(
                f"has {names[a]} {list(first)} and {names[b]} {list(second)}; rank {rank} and {weight} "
                f"{list(base.shape)} do not go with them"
            )
        factor = self._scale * self._config.factor_of(module)
        product = _Product(self._file, names[b], names[a], embedding, factor)
        changes.setdefault(weight, _Change()).products.append(product)

    def _take(self, changes: dict[str, _Change], checkpoint: Checkpoint, name: str, tensor: str) -> None:
        base, found = checkpoint.tensors.get(name), self._file.tensors[tensor].shape
        if base is None or base.shape != found:
            there = f"has it with shape {list(base.shape)}" if base else "has no such tensor"
            raise self._error(f"replaces {name} by one of shape {list(found)}, but the checkpoint {there}")
        if self._scale != 1:
            raise self._error(f"replaces {name} as a whole, which no scale but 1 can do; found {self._scale:g}")
        change = changes.setdefault(name, _Change())
        if change.taken is not None:
            raise self._error(f"replaces {name}, which another adapter has replaced already")
        change.taken = (self._file, tensor)

    def _check_targets(self, adapted: set[str], whole: set[str], checkpoint: Checkpoint) -> None:
        """The configuration and the tensors must speak of the same modules."""
        config = self._config
        for saved in config.saved:
            if not any(ends_with(name.rpartition(".")[0], saved) for name in whole):
                raise self._error(f"has no tensor for {saved}, which its modules_to_save names")
        for bias in (f"{module}.bias" for module in sorted(adapted) if config.biases):
            if bias in checkpoint.tensors and bias not in whole:
                raise self._error(f"has no {bias}, though its configuration says that biases were trained")
        if config.targets is None:
            return
        for module in sorted(adapted):
            if not any(ends_with(module, target) for target in config.targets):
                raise self._error(f"has factors for {module}, which its target_modules does not name")
        if not config.complete:
            return
        for name, info in checkpoint.tensors.items():
            module = name.removesuffix(".weight")
            named = module != name and len(info.shape) == 2 and any(ends_with(module, t) for t in config.targets)
            if named and module not in adapted and name not in whole:
                raise self._error(f"has no factors for {module}, which its target_modules names")

    def _error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: the adapter {message}")
