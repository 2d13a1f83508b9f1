"""CTranslate2 with int8 weights (a scale a row) and int8 activations, converted by its own converter."""

import json
import os
from pathlib import Path

from ..peer import Peer, Sources
from ..prepare import cached, hugging_face_folder, run_python
from ..worker import Meter, Runtime

QUANTIZATION = "int8"
TOKENIZER = "tokenizer.json"


def prepare(sources: Sources) -> Path:
    """Run the converter on the Hugging Face folder."""
    source = hugging_face_folder(sources)

    def make(folder: Path) -> None:
        what = (
            "--model",
            source,
            "--quantization",
            QUANTIZATION,
            "--output_dir",
            folder,
            "--force",
            "--copy_files",
            TOKENIZER,
        )
        command = ("-c", "from ctranslate2.converters.transformers import main; main()", *what)
        run_python(sources.peers_python, command, "the converter of CTranslate2")

    recipe = {
        "source": sources.digest,
        "quantization": QUANTIZATION,
        "files": [TOKENIZER],
        "versions": PEER.versions(sources),
    }
    return cached(sources.work / "ctranslate2-int8", recipe, make)


def load(model: Path, threads: int) -> Runtime:
    """It takes tokens by name, and gives them one by one to a callback, those of all rows step by step."""
    os.environ.setdefault("CT2_VERBOSE", "-1")
    import ctranslate2
    import numpy as np
    from tokenizers import Tokenizer

    generator = ctranslate2.Generator(str(model), device="cpu", intra_threads=threads, compute_type=QUANTIZATION)
    Tokenizer.from_file(str(model / TOKENIZER))  # not needed here, but part of a load that can serve text
    vocabulary = json.loads((model / "vocabulary.json").read_text())

    def generate(prompts: list[list[int]], new_tokens: int, meter: Meter) -> None:
        def take(result: ctranslate2.GenerationStepResult) -> bool:
            meter.token(result.token_id, result.batch_id)
            return False

        named = [[vocabulary[i] for i in prompt] for prompt in prompts]
        meter.ready()
        generator.generate_batch(
            named,
            max_batch_size=len(named),
            max_length=new_tokens,
            min_length=new_tokens,
            sampling_topk=1,
            end_token=[],
            include_prompt_in_result=False,
            callback=take,
        )

    def score(token_ids: list[int]) -> np.ndarray:
        return np.ascontiguousarray(np.array(generator.forward_batch([token_ids]))[0], np.float32)

    return Runtime(generate, score)


DISTRIBUTIONS = ("ctranslate2", "transformers", "torch")
PEER = Peer("ctranslate2", "CTranslate2 int8", DISTRIBUTIONS, "peers", prepare, load)
