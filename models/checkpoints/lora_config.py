"""PEFT's adapter_config.json: what a LoRA adapter multiplies its products with, and everything that is not merged."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ..config import ConfigReader

_UNSUPPORTED = {
    "use_dora": "DoRA's magnitudes are not merged",
    "use_qalora": "QALoRA's pooled inputs are not merged",
    "use_bdlora": "block-diagonal factors are not merged",
    "lora_bias": "biases of lora_B are not merged",
    "fan_in_fan_out": "it is of Conv1D weights (inputs, outputs), and every architecture here has linears",
    "layer_replication": "it changes the number of layers",
    "megatron_config": "layers split by Megatron are not read",
    "target_parameters": "adapters of parameters that are no linear's weight are not merged",
    "trainable_token_indices": "trained rows of the embedding are not merged",
    "ensure_weight_tying": "a tied head has one table, which cannot be the embedding's alone",
    "alora_invocation_tokens": "it is switched on by tokens at run time, so it cannot be merged",
    "arrow_config": "it is chosen by the input at run time, so it cannot be merged",
}
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "layers_pattern",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
}  # fmt: skip
"""Of training, of where things came from, or of options that are refused when they are on."""
_READ = {
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_to_transform", "lora_alpha",
    "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "use_rslora",
}  # fmt: skip
_BASE_KEPT = (None, True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base weights as they are; the others trained against a changed base."""
_NAME = re.compile(r"\^?[\w.-]+")
_MOST = 1 << 20  # of a rank

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """targets: names that modules with factors end with; None if a regular expression or PEFT itself chose them.

    complete: whether every module that `targets` names must have factors. saved: names of modules stored whole.
    biases: whether the biases of modules with factors are stored too.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    targets: tuple[str, ...] | None
    complete: bool
    saved: tuple[str, ...]
    biases: bool

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str = "adapter_config.json") -> "LoraConfig":
        """Read adapter_config.json as a mapping.

        Raises:
            ConfigError: a key is missing or wrong, or an option is set that is not merged or not known.
        """
        read = ConfigReader(values, where)
        read.choice("peft_type", ("LORA",))
        for key in read.names():
            if key not in _READ and key not in _WITHOUT_EFFECT:
                read.refuse(key, _UNSUPPORTED.get(key, "it is unknown here; merge the adapter with PEFT"))
        initial = values.get("init_lora_weights")
        if initial not in _BASE_KEPT:
            raise read.error(
                f"init_lora_weights {initial!r} changed the base weights before training; convert the adapter "
                "(PEFT: path_initial_model_for_weight_conversion)"
            )
        chosen = values.get("target_modules")
        return cls(
            rank=read.integer("r", maximum=_MOST),
            alpha=read.number("lora_alpha", positive=False),
            rank_pattern=_pattern(read, "rank_pattern", lambda ranks, key: ranks.integer(key, maximum=_MOST)),
            alpha_pattern=_pattern(read, "alpha_pattern", lambda alphas, key: alphas.number(key, positive=False)),
            use_rslora=read.boolean("use_rslora", False),
            targets=None if chosen is None or isinstance(chosen, str) else read.texts("target_modules"),
            complete=not any(values.get(key) for key in ("layers_to_transform", "exclude_modules")),
            saved=read.texts("modules_to_save", ()),
            biases=read.choice("bias", ("none", "all", "lora_only"), "none") != "none",
        )

    def rank_of(self, module: str) -> int:
        """The rank of a module's factors."""
        return _first_match(self.rank_pattern, module, self.rank)

    def factor_of(self, module: str) -> float:
        """What the product of a module's factors is multiplied with."""
        rank = self.rank_of(module)
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def ends_with(module: str, name: str) -> bool:
    """Whether `name` is the last part of the dotted name `module`, or all of it."""
    return module == name or module.endswith(f".{name}")


def _pattern(read: ConfigReader, key: str, value: Callable[[ConfigReader, str], Number]) -> dict[str, Number]:
    """Name of a module -> its value. PEFT matches regular expressions; one from a file could take for ever."""
    section = read.section(key)
    for name in section.names():
        if not _NAME.fullmatch(name):
            raise section.error(f"{name!r} is no name of a module, and regular expressions are not supported")
    return {name: value(section, name) for name in section.names()}


def _first_match(pattern: Mapping[str, Number], module: str, default: Number) -> Number:
    for key, value in pattern.items():
        if module == key[1:] if key.startswith("^") else ends_with(module, key):
            return value
    return default
