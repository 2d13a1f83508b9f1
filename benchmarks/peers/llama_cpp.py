"""llama.cpp through llama-cpp-python's thin layer over its C interface, on the GGUF file itself."""

from pathlib import Path

from ..peer import Peer, Sources
from ..worker import Generate, Meter

CONTEXT = 4096


def prepare(sources: Sources) -> Path:
    """The model file as it is."""
    return sources.model


def load(model: Path, threads: int) -> Generate:
    """One context for all requests, emptied before each."""
    import llama_cpp
    import numpy as np

    llama = llama_cpp.Llama(
        str(model), n_ctx=CONTEXT, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    vocab_size = llama.n_vocab()

    def generate(prompt_ids: list[int], new_tokens: int, meter: Meter) -> None:
        llama.reset()
        meter.ready()
        tokens = prompt_ids
        for _ in range(new_tokens):
            llama.eval(tokens)
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(llama.ctx), (vocab_size,))
            tokens = [int(logits.argmax())]
            meter.token(tokens[0])

    return generate


PEER = Peer("llama_cpp", "llama.cpp, the file's own blocks", ("llama_cpp_python",), "peers", prepare, load)
