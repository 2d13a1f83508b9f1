"""What several peers are made from: the GGUF's weights, dequantised to fp32, as a Hugging Face folder.

Everything made is kept in the work folder under a stamp of its recipe, and made again only when the recipe changes.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import BenchmarkError
from .peer import Sources, installed_versions

ROOT = Path(__file__).resolve().parent.parent
STAMP = "zonda-stamp.json"
STDERR_LINES = 20


def cached(folder: Path, recipe: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
    """Return `folder`, made by `make` if it is not there or was made by another recipe.

    It is made under a temporary name, so what was interrupted is never taken for finished.
    """
    wanted = json.dumps(recipe, indent=2, sort_keys=True)
    stamp = folder / STAMP
    if stamp.exists() and stamp.read_text() == wanted:
        return folder
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    make(unfinished)
    (unfinished / STAMP).write_text(wanted)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return folder


def hugging_face_folder(sources: Sources) -> Path:
    """config.json, model.safetensors (fp32) and the tokenizer, made by transformers from the GGUF.

    Raises:
        UnavailableError: transformers, torch or gguf is not installed in the peers' environment.
        BenchmarkError: the conversion failed.
    """

    def make(folder: Path) -> None:
        command = ("-m", "benchmarks.prepare", sources.model, folder)
        run_python(sources.peers_python, command, "the conversion of the GGUF by transformers")

    versions = installed_versions(sources.peers_python, ("gguf", "torch", "transformers"))
    return cached(sources.work / "huggingface-fp32", {"source": sources.digest, "versions": versions}, make)


def run_python(python: Path, arguments: Sequence[str | Path], purpose: str) -> None:
    """Run an interpreter to its end, offline; BenchmarkError with the end of its output if it fails."""
    run = subprocess.run(
        [python, *arguments],
        env=worker_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if run.returncode:
        raise BenchmarkError(f"{purpose} failed (exit status {run.returncode}):\n{last_lines(run.stdout)}")


def worker_environment(threads: int | None = None) -> dict[str, str]:
    """The environment of a peer's process: this package importable, no network, thread pools of the wanted size."""
    found = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(found), "HF_HUB_OFFLINE": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false"}
    if threads is not None:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return environment


def last_lines(text: str) -> str:
    """The end of a log, where the error stands."""
    return "\n".join(text.splitlines()[-STDERR_LINES:])


def convert(model: Path, folder: Path) -> None:
    """GGUF to Hugging Face folder; runs in the peers' environment."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without this flag transformers keeps the blocks packed wherever the optional package `kernels` is installed.
    dense = GgufConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(
        model.parent, gguf_file=model.name, dtype=torch.float32, quantization_config=dense
    )
    loaded.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name).save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
