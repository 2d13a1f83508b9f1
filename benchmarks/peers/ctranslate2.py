"""CTranslate2 with int8 weights (a scale a row) and int8 activations, converted by its own converter."""

import json
import os
from pathlib import Path

from ..peer import Peer, Sources
from ..prepare import cached, hugging_face_folder, run_python
from ..worker import Generate, Meter

QUANTIZATION = "int8"


def prepare(sources: Sources) -> Path:
    """Run the converter on the Hugging Face folder."""
    source = hugging_face_folder(sources)

    def make(folder: Path) -> None:
        what = ("--model", source, "--quantization", QUANTIZATION, "--output_dir", folder, "--force")
        command = ("-c", "from ctranslate2.converters.transformers import main; main()", *what)
        run_python(sources.peers_python, command, "the converter of CTranslate2")

    recipe = {"source": sources.digest, "quantization": QUANTIZATION, "versions": PEER.versions(sources)}
    return cached(sources.work / "ctranslate2-int8", recipe, make)


def load(model: Path, threads: int) -> Generate:
    """It takes tokens by name, and gives them one by one to a callback."""
    os.environ.setdefault("CT2_VERBOSE", "-1")
    import ctranslate2

    generator = ctranslate2.Generator(str(model), device="cpu", intra_threads=threads, compute_type=QUANTIZATION)
    vocabulary = json.loads((model / "vocabulary.json").read_text())

    def generate(prompt_ids: list[int], new_tokens: int, meter: Meter) -> None:
        def take(result: ctranslate2.GenerationStepResult) -> bool:
            meter.token(result.token_id)
            return False

        prompt = [vocabulary[i] for i in prompt_ids]
        meter.ready()
        generator.generate_batch(
            [prompt],
            max_length=new_tokens,
            min_length=new_tokens,
            sampling_topk=1,
            end_token=[],
            include_prompt_in_result=False,
            callback=take,
        )

    return generate


DISTRIBUTIONS = ("ctranslate2", "transformers", "torch")
PEER = Peer("ctranslate2", "CTranslate2 int8", DISTRIBUTIONS, "peers", prepare, load)
