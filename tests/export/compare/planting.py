"""A small model exported to a folder like an unfinished bundle, and ways to change its files."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from support import export_graphs, randomise

from zonda import EngineError, ParityError
from zonda.export import onnx_files
from zonda.export.compare import Finding
from zonda.export.compare.chain import locate
from zonda.export.compare.eager import EagerSubject
from zonda.export.compare.engine import EngineSubject
from zonda.export.compare.graph import GraphSubject
from zonda.export.compare.program import ProgramSubject
from zonda.export.compare.steps import make_script, pseudo_random_prompts
from zonda.export.describe import make_contract
from zonda.export.proof import run_eager
from zonda.export.weight_proof import WrittenWeights
from zonda.models.llama import Llama, LlamaConfig
from zonda.runtime.engines import onnxruntime as target
from zonda.runtime.golden import Golden
from zonda.runtime.manifest import Limits
from zonda.runtime.metrics import THRESHOLDS
from zonda.runtime.parity import prove

VOCABULARY = 97
LIMITS = Limits(capacity=96, max_batch=4, max_chunk=16, vocab_size=VOCABULARY)
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}


@dataclass
class Unfinished:
    """folder: with onnx/. module: on the meta device. load: its weights."""

    folder: Path
    module: torch.nn.Module
    load: Callable[[str], torch.Tensor]
    program: ProgramSubject  # shared by copies, because tracing takes seconds
    golden: Golden  # of the eager model

    def copy(self, to: Path) -> "Unfinished":
        shutil.copytree(self.folder, to)
        return Unfinished(to, self.module, self.load, self.program, self.golden)

    def edit(self, file: str, change: Callable[[onnx.ModelProto], None]) -> None:
        path = self.folder / "onnx" / file
        model = onnx.load(path, load_external_data=False)
        change(model)
        path.write_bytes(model.SerializeToString())

    def caught(self) -> str | None:
        """What the gate of a build says: of the weights, the lowered graph, the universal one. None: it passes."""
        spec = make_contract(self.module.kv_shapes, VOCABULARY)
        try:
            packs = {f"{q}.packed": (q, k, v) for q, k, v in self.packed}
            WrittenWeights(self.folder, packs).finish(self.load)
            for graph in (onnx_files.LOWERED, onnx_files.UNIVERSAL):
                engine = target.OnnxRuntimeEngine(self.folder / graph, spec, LIMITS, threads=1)
                prove(engine, self.golden, THRESHOLDS["float32"])
        except (ParityError, EngineError) as error:
            return str(error)
        return None

    @property
    def packed(self) -> list[tuple[str, str, str]]:
        prefixes = (f"model.layers.{layer}.self_attn" for layer in range(CONFIG["num_hidden_layers"]))
        return [tuple(f"{prefix}.{name}_proj.weight" for name in "qkv") for prefix in prefixes]

    def locate(self) -> Finding | None:
        """As `locate_in_build`, but for the shared trace; the gate has to catch what is found, and nothing else."""
        finding = self._locate()
        error = self.caught()
        assert (finding is None) == (error is None), f"gate: {error}; finding: {finding}"
        return finding

    def _locate(self) -> Finding | None:
        spec = make_contract(self.module.kv_shapes, VOCABULARY)
        model = self.folder / onnx_files.LOWERED
        chain = [
            EagerSubject(self.module, self.load),
            self.program,
            GraphSubject(self.folder / onnx_files.UNIVERSAL, "universal"),
            GraphSubject(model, "lowered"),
            EngineSubject(lambda: target.OnnxRuntimeEngine(model, spec, LIMITS, threads=1), spec),
        ]
        script = make_script(pseudo_random_prompts(VOCABULARY), LIMITS)
        return locate(chain, script, THRESHOLDS["float32"], closely=True)


def export(folder: Path, build: Callable[[LlamaConfig, int], torch.nn.Module] = Llama) -> Unfinished:
    folder.mkdir(parents=True)
    config = LlamaConfig.read(CONFIG)
    model = build(config, LIMITS.capacity + LIMITS.max_chunk)
    randomise(model)
    weights = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    module = export_graphs(folder, lambda rows: build(config, rows), weights.__getitem__, LIMITS.capacity + 16)

    def load(name):
        return weights[name].detach()

    lengths = (6, 15, 27, 36)  # of different lengths, as a build's golden prompts are
    rows = zip(pseudo_random_prompts(VOCABULARY), lengths, strict=False)
    prompts = [np.array(prompt[:length]) for prompt, length in rows]
    golden = run_eager(module, load, prompts)
    return Unfinished(folder, module, load, ProgramSubject(module, load), golden)


def node(model: onnx.ModelProto, output: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if output in n.output)


def attribute(of: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    return next(a for a in of.attribute if a.name == name)


def replace_weight(model: onnx.ModelProto, name: str, values: torch.Tensor) -> None:
    old = next(i for i in model.graph.initializer if i.name == name)
    model.graph.initializer.remove(old)
    model.graph.initializer.append(numpy_helper.from_array(values.float().contiguous().numpy(), name))
