"""What several tests share: random models that are not blind, executors with one face, and the six scenarios."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from zonda.export import onnx_files
from zonda.export.describe import make_contract
from zonda.export.lower.onnxruntime import lower, with_int8_cache
from zonda.export.universal import export_universal
from zonda.models import layers
from zonda.models.cache import Cache
from zonda.models.llama import Llama, LlamaConfig
from zonda.runtime import contract
from zonda.runtime.engines.onnxruntime import OnnxRuntimeEngine
from zonda.runtime.engines.ort import onnxruntime as ort
from zonda.runtime.manifest import Limits

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Of a configuration: small, and heads are in groups."""

RELATIVE_TOLERANCE = 1e-5
"""Of the largest |logit|: float32 noise of these models is 1.5e-6 of it, eps × 10 moves logits by 100 times more."""


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0, norm: float = 1.0) -> None:
    """Weights that make every part of a model count: with default initialisation a wrong RoPE base goes unseen.

    norm: the mean of norm weights, 0 where they are offsets to 1.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        key = name.rpartition(".")[2]
        if not parameter.is_floating_point():
            information = torch.iinfo(parameter.dtype)
            parameter.random_(information.min, information.max + 1, generator=generator)
        elif key in ("scales", "offsets"):
            parameter.uniform_(0.001, 0.02, generator=generator)
        elif "embed" in name:
            parameter.normal_(0, 1, generator=generator)
        elif parameter.ndim >= 2:
            parameter.normal_(0, 2 / parameter.shape[-1] ** 0.5, generator=generator)
        elif "norm" in name and not name.endswith("bias"):
            parameter.normal_(norm, 0.2, generator=generator)
        else:
            parameter.normal_(0, 0.2, generator=generator)


def normal_logits(vocab: int, scale: float = 2.0, seed: int = 0) -> np.ndarray:
    """Logits that nobody may write to, like a view of engine memory that others still need."""
    logits = (np.random.default_rng(seed).standard_normal(vocab) * scale).astype(np.float32)
    logits.flags.writeable = False
    return logits


TWO_LAYERS = LlamaConfig.read(
    {
        "vocab_size": 61,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
)


def with_quantised_norm(rows: int) -> Llama:
    """A Llama of two layers, the first of whose norms is a QRmsNorm: all markers that have a plugin."""
    model = Llama(TWO_LAYERS, rows)
    model.model.layers[0].input_layernorm = layers.QRmsNorm(64, 1e-6)
    return model


def random_with_quantised_norm(rows: int) -> Llama:
    """The same, filled."""
    made = with_quantised_norm(rows).eval()
    randomise(made)
    norm = made.model.layers[0].input_layernorm
    norm.codes.random_(-127, 128, generator=torch.Generator().manual_seed(0))
    norm.scales.uniform_(0.001, 0.02, generator=torch.Generator().manual_seed(1))
    return made


class Executor(Protocol):
    """Anything that runs steps of the graph contract over its own rows."""

    def step(self, ids: np.ndarray, offsets: np.ndarray, lens: np.ndarray, positions: np.ndarray) -> np.ndarray: ...


class Eager:
    def __init__(self, model: nn.Module, rows: int, capacity: int) -> None:
        self.model = model
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.cache = Cache.zeros(model.kv_shapes, rows, capacity, dtype)

    def step(self, ids, offsets, lens, positions):
        start = offsets[:, None] + np.arange(ids.shape[1])
        arguments = [torch.from_numpy(np.ascontiguousarray(a)) for a in (ids, offsets, start, lens, positions)]
        with torch.no_grad():
            return self.model(*arguments, self.cache).numpy()


class PlainOnnx:
    """A graph of the contract on ONNX Runtime as any user would run it: no binding, states passed by hand."""

    def __init__(self, path: Path, kv_shapes: Sequence[Any], rows: int, capacity: int) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.session = ort.InferenceSession(path, options)
        self.states = {}
        for layer, s in enumerate(kv_shapes):
            for kind, dim in (("key", s.key_dim), ("value", s.value_dim)):
                shape = (rows, s.num_key_value_heads, capacity, dim)
                self.states[contract.state_names(layer, kind)] = np.zeros(shape, np.float32)

    def step(self, ids, offsets, lens, positions):
        start = offsets[:, None].astype(np.int64) + np.arange(ids.shape[1])
        feed = dict(zip(contract.INPUTS, (ids, offsets, start, lens, positions), strict=True))
        feed |= {name: value for (name, _), value in self.states.items()}
        logits, *presents = self.session.run([contract.LOGITS, *(after for _, after in self.states)], feed)
        self.states = dict(zip(self.states, presents, strict=True))
        return logits


class Lowered:
    def __init__(self, engine: OnnxRuntimeEngine, rows: int) -> None:
        self.engine = engine
        self.cache = engine.allocate(rows)

    def step(self, ids, offsets, lens, positions):
        return self.engine.step(self.cache, 0, ids, offsets, lens, positions).copy()


SCENARIOS: dict[str, list[list[int]]] = {
    "prefill": [[24]],
    "decode": [[5], *[[1]] * 19],
    "ragged batch of 4": [[9, 2, 13, 6], *[[1, 1, 1, 1]] * 8],
    "chunked prefill": [[7], [7], [7], [3]],
    "continuation after decode": [[6], [1], [1], [1], [8], [1], [1]],
    "batch with idle rows": [[8, 0, 3, 5], [1, 4, 0, 1], [0, 1, 1, 0], [3, 0, 1, 7], [1, 1, 1, 0]],
}
"""Name -> steps; a step gives how many new tokens each row brings."""


def run_scenario(executor: Executor, tokens: np.ndarray, steps: list[list[int]]) -> list[np.ndarray]:
    """Feed `tokens` (B, N) step by step, teacher-forced; return each row's logits, (tokens fed, V)."""
    offsets = np.zeros(len(tokens), np.int32)
    collected: list[list[np.ndarray]] = [[] for _ in tokens]
    for step in steps:
        lens = np.array(step, np.int32)
        width = int(lens.max())
        ids = np.zeros((len(tokens), width), np.int64)
        for row, (offset, length) in enumerate(zip(offsets, lens, strict=True)):
            ids[row, :length] = tokens[row, offset : offset + length]
        positions = np.arange(width)[None].repeat(len(tokens), 0)
        logits = executor.step(ids, offsets, lens, positions)
        for row, length in enumerate(lens):
            collected[row].append(logits[row, :length])
        offsets = offsets + lens
    return [np.concatenate(parts) for parts in collected]


def states_of_random_rows(model: nn.Module, vocab_size: int, length: int) -> list[list[np.ndarray]]:
    """What the eager model caches of four random rows: of each its states (Hkv, length, D)."""
    eager = Eager(model, 4, length)
    run_scenario(eager, np.random.default_rng(5).integers(0, vocab_size, (4, length)), [[length] * 4])
    return [[state[row].numpy() for state in eager.cache.tensors()] for row in range(4)]


def run_for_last_tokens(
    executor: Executor, tokens: np.ndarray, steps: list[list[int]]
) -> Iterator[tuple[int, int, np.ndarray]]:
    """As `run_scenario`, but ask for one token a row, as generation does; yield (row, position, logits (V,))."""
    offsets = np.zeros(len(tokens), np.int32)
    for step in steps:
        lens = np.array(step, np.int32)
        ids = np.zeros((len(tokens), int(lens.max())), np.int64)
        for row, (offset, length) in enumerate(zip(offsets, lens, strict=True)):
            ids[row, :length] = tokens[row, offset : offset + length]
        logits = executor.step(ids, offsets, lens, np.maximum(lens - 1, 0)[:, None].astype(np.int64))
        offsets = offsets + lens
        for row in np.flatnonzero(lens):
            yield int(row), int(offsets[row]) - 1, logits[row, 0]


def export_graphs(
    directory: Path,
    build: Callable[[int], nn.Module],
    load: Callable[[str], torch.Tensor],
    rows: int,
    calibration: Sequence[Sequence[np.ndarray]] = (),
) -> nn.Module:
    """Write universal and lowered graph with their weights into `directory`; return the meta-device module.

    calibration: of each row its states, for a cache in int8; a cache in floats if there are none.
    """
    with torch.device("meta"):
        module = build(rows)
    buffers = dict(module.named_buffers(remove_duplicate=False))
    universal = export_universal(module)
    lowered = lower(universal)
    if calibration:
        lowered = with_int8_cache(lowered, calibration)
    onnx_files.write(
        directory,
        universal,
        lowered,
        lambda name: buffers[name] if name in buffers and not buffers[name].is_meta else load(name),
    )
    return module


def open_engine(
    directory: Path, module: nn.Module, vocab_size: int, *, capacity: int, max_batch: int = 4, max_chunk: int = 32
) -> OnnxRuntimeEngine:
    limits = Limits(capacity=capacity, max_batch=max_batch, max_chunk=max_chunk, vocab_size=vocab_size)
    spec, forms = make_contract(module.kv_shapes, vocab_size), directory / onnx_files.CACHE_FORMS
    model = directory / onnx_files.LOWERED
    if not forms.is_file():
        return OnnxRuntimeEngine(model, spec, limits, threads=1)
    return OnnxRuntimeEngine(model, spec.with_states("int8"), limits, threads=1, cache_forms=forms)
