"""`--quant`: a checkpoint of floats, shown as if it held its linears and embeddings in blocks.

A view: `form_choice.py` says which weight is held how, `block_search.py` finds the blocks, and this keeps them.
"""

import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn

from .. import BuildError, CheckpointError
from . import block_search
from .checkpoints.base import Checkpoint, CheckpointView, Quantization
from .form_choice import Choice, choose_forms
from .quantization import BlockQuantized


def quantized(checkpoint: Checkpoint, model: nn.Module, quant: str, folder: Path) -> Checkpoint:
    """The checkpoint with its weights in blocks; itself if `quant` is none.

    Args:
        checkpoint: whose tensor names are the model's.
        model: as its architecture builds it, on any device.
        quant: `none`, `int8` or `int4`.
        folder: where a temporary file goes, once a weight is asked for; or its nearest parent that is there by then.

    Raises:
        BuildError: as of `choose_forms`.
    """
    if quant == "none":
        return checkpoint
    return QuantizedCheckpoint(checkpoint, choose_forms(model, checkpoint, quant), folder)


class QuantizedCheckpoint(CheckpointView):
    """See `Checkpoint`. Each weight is quantised once, when its blocks are first asked for, and kept in a file.

    The file has no name, so that it is gone when the process ends, however it ends.
    """

    def __init__(self, checkpoint: Checkpoint, choice: Choice, folder: Path) -> None:
        self._forms = choice.forms
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._places: dict[str, int] = {}
        made = {
            name: replace(checkpoint.tensors[name], dtype=torch.float32, form=form)
            for name, form in choice.forms.items()
            if name in checkpoint.tensors
        }
        said = Quantization(choice.quant, choice.weights, choice.raised)
        super().__init__(
            checkpoint, {**checkpoint.tensors, **made}, source=replace(checkpoint.source, quantization=said)
        )

    def load(self, name: str) -> Tensor:
        """See `Checkpoint`: what the blocks stand for; raises as `blocks` does."""
        blocks = self.blocks(name) if name in self._forms else None
        return super().load(name) if blocks is None else blocks.dequantize()

    def blocks(self, name: str) -> BlockQuantized | None:
        """See `Checkpoint`.

        Raises:
            CheckpointError: as of `load`; or one of the weights is not a finite number.
            BuildError: the temporary file cannot be written.
        """
        if name not in self._forms:
            return super().blocks(name)
        if name in self._places:
            return self._read(name)
        blocks = self._quantize(name)
        try:
            self._write(name, blocks)
        except OSError as error:
            raise BuildError(
                f"cannot keep the quantised {name} in a temporary file in {self._folder}: {error}"
            ) from error
        return blocks

    def _quantize(self, name: str) -> BlockQuantized:
        blocks = block_search.quantize(self._checkpoint.load(name), self._forms[name])
        for part in (blocks.scales, blocks.offsets):
            if part is not None and not part.isfinite().all():
                raise CheckpointError(
                    f"{self.source.name}: {name} has a weight that is not a finite number, so it cannot be quantised"
                )
        return blocks

    def _write(self, name: str, blocks: BlockQuantized) -> None:
        if self._file is None:
            folder = next(path for path in (self._folder, *self._folder.parents) if path.exists())
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as the view
            weakref.finalize(self, self._file.close)
        place = self._file.seek(0, 2)
        for part in (blocks.codes, blocks.scales, blocks.offsets):
            if part is not None:
                self._file.write(part.numpy().data)
        self._places[name] = place

    def _read(self, name: str) -> BlockQuantized:
        assert self._file is not None
        self._file.seek(self._places[name])
        form, (rows, columns) = self._forms[name], self.tensors[name].shape
        codes = torch.empty(rows, columns * form.bits // 8, dtype=torch.uint8)
        scales, offsets = (torch.empty(rows, columns // form.block_size) for _ in range(2))
        for part in (codes, scales, *([offsets] if form.offsets else [])):
            self._file.readinto(part.numpy())  # type: ignore[attr-defined]
        return BlockQuantized(form.bits, form.block_size, codes, scales, offsets if form.offsets else None)
