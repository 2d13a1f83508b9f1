"""AWQ, GPTQ and FP8 folders, packed and dequantised from the formats' own definitions, in numpy and with loops.

Nothing here is shared with the readers: codes are put into words one by one, and weights are computed element by element.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

AWQ_ORDER = {4: [0, 2, 4, 6, 1, 3, 5, 7], 8: [0, 2, 1, 3]}


@dataclass(frozen=True)
class Quantised:
    """codes (K, N), zeros and scales (G, N), groups (K,): the numbers of one linear, before any format."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    groups: np.ndarray

    def weight(self) -> np.ndarray:
        """(N, K) float64."""
        rows = [
            (self.codes[k].astype(float) - self.zeros[g]) * self.scales[g].astype(float)
            for k, g in enumerate(self.groups)
        ]
        return np.array(rows).T


def quantised(
    inputs: int,
    outputs: int,
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = False,
    act_order: bool = False,
    scales: type[np.floating] = np.float16,
    seed: int = 0,
) -> Quantised:
    random = np.random.default_rng(seed)
    size = inputs if group_size == -1 else group_size
    groups = np.arange(inputs) // size
    count = int(groups.max()) + 1
    zeros = np.full((count, outputs), 1 << bits - 1) if symmetric else random.integers(0, 1 << bits, (count, outputs))
    return Quantised(
        random.integers(0, 1 << bits, (inputs, outputs)),
        zeros,
        (random.uniform(0.5, 2, (count, outputs)) * 2 / inputs**0.5 / (1 << bits - 1)).astype(scales),
        random.permutation(groups) if act_order else groups,
    )


def words(values: np.ndarray, bits: int, order: list[int] | None = None) -> torch.Tensor:
    """(R, C) integers -> (R, C * bits / 32) int32; field i of a word is the column order[i] of its columns."""
    fields = 32 // bits
    packed = np.zeros((values.shape[0], values.shape[1] // fields), np.uint64)
    for column in range(packed.shape[1]):
        for i in range(fields):
            field = values[:, column * fields + (order[i] if order else i)].astype(np.uint64)
            packed[:, column] |= field << np.uint64(bits * i)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32))


def gptq_tensors(q: Quantised, bits: int, *, version: str = "gptq", g_idx: bool = True) -> dict[str, torch.Tensor]:
    stored = (q.zeros - 1) % (1 << bits) if version == "gptq" else q.zeros
    tensors = {
        "qweight": words(q.codes.T, bits).T.contiguous(),
        "qzeros": words(stored, bits),
        "scales": torch.from_numpy(q.scales),
    }
    return tensors | ({"g_idx": torch.from_numpy(q.groups.astype(np.int32))} if g_idx else {})


def awq_tensors(q: Quantised, bits: int) -> dict[str, torch.Tensor]:
    return {
        "qweight": words(q.codes, bits, AWQ_ORDER[bits]),
        "qzeros": words(q.zeros, bits, AWQ_ORDER[bits]),
        "scales": torch.from_numpy(q.scales),
    }


def write(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict | None, **config) -> Path:
    """An HF folder with these tensors and this `quantization_config`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    values = config if quantization is None else config | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def linear(tensors: dict[str, torch.Tensor], module: str = "model.layers.0.mlp.up_proj") -> dict[str, torch.Tensor]:
    return {f"{module}.{part}": tensor for part, tensor in tensors.items()}


def requantise_folder(source: Path, target: Path, method: str, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """A folder whose linears are quantised anew with random numbers; returns its weights dequantised, float32.

    method: gptq, act-order, awq, or fp8 (blocks of 16 × 32).
    """
    from safetensors.torch import load_file

    tensors, plain = {}, {}
    for i, (name, tensor) in enumerate(load_file(source / "model.safetensors").items()):
        if not name.endswith("_proj.weight"):
            tensors[name] = plain[name] = tensor
            continue
        module, (outputs, inputs) = name.removesuffix(".weight"), tensor.shape
        if method == "fp8":
            stored, scale, weight = fp8_blocks(tensor, (16, 32))
            tensors |= {name: stored, f"{module}.weight_scale_inv": scale}
            plain[name] = weight
            continue
        q = quantised(inputs, outputs, group_size=32, act_order=method == "act-order", seed=seed + i)
        tensors |= linear(awq_tensors(q, 4) if method == "awq" else gptq_tensors(q, 4), module)
        plain[name] = torch.from_numpy(q.weight()).float()
    quantization = {
        "fp8": {"quant_method": "fp8", "weight_block_size": [16, 32], "activation_scheme": "dynamic"},
        "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    }.get(method, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": method == "act-order"})
    write(target, tensors, quantization, **json.loads((source / "config.json").read_text()))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (target / file).write_bytes((source / file).read_bytes())
    return plain


def fp8_blocks(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(e4m3 weight, scales of its blocks, float32 weight that they stand for), block by block."""
    rows, columns = weight.shape
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    stored, scale = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty(grid)
    plain = torch.empty(rows, columns)
    for i in range(grid[0]):
        for j in range(grid[1]):
            place = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scale[i, j] = weight[place].abs().max() / 448
            stored[place] = (weight[place] / scale[i, j]).to(torch.float8_e4m3fn)
            plain[place] = (e4m3(stored[place]) * scale[i, j].double()).float()
    return stored, scale, plain


def e4m3(stored: torch.Tensor) -> torch.Tensor:
    """Sign, four bits of exponent with bias 7, three of mantissa: float64 from the bytes, by the format's definition."""
    byte = stored.contiguous().view(torch.uint8).int()
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    value = torch.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9).double()
    value[byte & 0x7F == 0x7F] = float("nan")
    return value * (1 - 2 * sign)
