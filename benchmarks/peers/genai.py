"""onnxruntime-genai, on the fp32 model that its own builder makes, pruned to the last position's logits."""

import json
from pathlib import Path

from ..peer import Peer, Sources
from ..prepare import cached, hugging_face_folder, run_python
from ..worker import Meter, Runtime

OPTIONS = ("prune_lm_head=true", "hf_token=false")  # the builder's defaults otherwise: q, k and v in one MatMul, GQA


def prepare(sources: Sources) -> Path:
    """Run the builder on the Hugging Face folder."""
    source = hugging_face_folder(sources)

    def make(folder: Path) -> None:
        cache = folder.parent / "genai-builder-cache"
        what = ("-m", source, "-o", folder, "-c", cache, "-p", "fp32", "-e", "cpu", "--extra_options", *OPTIONS)
        command = ("-m", "onnxruntime_genai.models.builder", *what)
        run_python(sources.peers_python, command, "the model builder of onnxruntime-genai")

    recipe = {"source": sources.digest, "options": OPTIONS, "versions": PEER.versions(sources)}
    return cached(sources.work / "genai-fp32", recipe, make)


def load(model: Path, threads: int) -> Runtime:
    """Every request has a generator of its own, with a KV cache of the length it needs; making it is setup."""
    import numpy as np
    import onnxruntime_genai as og

    # It stops at the end token, and asks for one that exists; `min_length` would change the text by suppressing it. So
    # it gets the vocabulary's last id, which no text needs; should one contain it, the meter misses tokens and says so.
    vocab_size = json.loads((model / "genai_config.json").read_text())["model"]["vocab_size"]
    session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    config = og.Config(str(model))
    config.overlay(json.dumps({"model": {"eos_token_id": vocab_size - 1, "decoder": {"session_options": session}}}))
    loaded = og.Model(config)
    og.Tokenizer(loaded)  # not needed here, but part of a load that can serve text

    def generate(prompts: list[list[int]], new_tokens: int, meter: Meter) -> None:
        params = og.GeneratorParams(loaded)
        params.set_search_options(do_sample=False, batch_size=len(prompts), max_length=len(prompts[0]) + new_tokens)
        generator = og.Generator(loaded, params)
        meter.ready()
        generator.append_tokens(np.array(prompts, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
            for row, token_id in enumerate(generator.get_next_tokens()):
                meter.token(int(token_id), row)

    return Runtime(generate)  # pruned: it has no logits but the last


DISTRIBUTIONS = ("onnxruntime-genai", "onnxruntime", "transformers", "torch")
PEER = Peer("genai", "onnxruntime-genai fp32", DISTRIBUTIONS, "peers", prepare, load)
