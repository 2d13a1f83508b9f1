"""PEFT folders, written by hand, and what they do to a model: the unmerged forward pass, x Wᵀ + factor · x Aᵀ Bᵀ."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

PREFIX = "base_model.model."
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "inference_mode": True,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
    "peft_version": "0.21.2",
    "base_model_name_or_path": "org/base",
}
Factors = Mapping[str, tuple[Tensor, Tensor]]


def factors(shapes: Mapping[str, tuple[int, int]], rank: int = 4, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (A (r, K), B (N, r)) for weights (N, K)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        module: (
            torch.randn(rank, columns, generator=generator) * 0.2,
            torch.randn(rows, rank, generator=generator) * 0.2,
        )
        for module, (rows, columns) in shapes.items()
    }


def write_adapter(folder: Path, made: Factors, *, extra: Mapping[str, Tensor] = {}, **changes) -> Path:
    """An adapter; `extra` has full names, `changes` are of its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(extra)
    for module, (a, b) in made.items():
        tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    return folder


def apply_unmerged(model: nn.Module, made: Factors, factor: float | Mapping[str, float]) -> None:
    """Let the linears of a torch model add what an adapter adds, without touching their weights."""

    def adapt(module: nn.Module, a: Tensor, b: Tensor, by: float) -> None:
        module.register_forward_hook(lambda _, inputs, output: output + by * (inputs[0] @ a.T) @ b.T)

    for name, (a, b) in made.items():
        adapt(model.get_submodule(name), a, b, factor if isinstance(factor, float) else factor[name])
