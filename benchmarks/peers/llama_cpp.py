"""llama.cpp through llama-cpp-python's bindings of its C interface, on the GGUF file itself."""

from pathlib import Path

from .. import UnavailableError
from ..peer import Peer, Sources
from ..worker import Meter, Runtime

CONTEXT = 2048
"""Tokens a row: its cache is allocated at once, as large as what Zonda's bundles serve by default."""

CHUNK = 512
"""Tokens of one call, its default for prefill."""


def prepare(sources: Sources) -> Path:
    """The model file as it is."""
    return sources.model


def load(model: Path, threads: int) -> Runtime:
    """One context a batch size, kept for all requests and emptied before each; a first of one row is part of a load."""
    import llama_cpp as api
    import numpy as np
    from llama_cpp._logger import set_verbose

    set_verbose(False)
    api.llama_backend_init()
    loaded = api.llama_model_load_from_file(str(model).encode(), api.llama_model_default_params())
    if not loaded:
        raise RuntimeError(f"llama.cpp cannot load {model}")
    vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(loaded))
    batch = api.llama_batch_init(CHUNK, 0, 1)
    contexts: dict[int, int] = {}

    def context(rows: int) -> int:
        """A context of so many rows, empty."""
        if rows not in contexts:
            params = api.llama_context_default_params()
            params.n_ctx, params.n_seq_max = rows * CONTEXT, rows
            params.n_batch = CHUNK
            params.n_threads = params.n_threads_batch = threads
            contexts[rows] = api.llama_init_from_model(loaded, params)
        api.llama_memory_clear(api.llama_get_memory(contexts[rows]), True)
        return contexts[rows]

    def decode(of: int, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Compute (token, position, row, whether its logits are wanted), at most CHUNK."""
        batch.n_tokens = len(tokens)
        for i, (token, position, row, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        if status := api.llama_decode(of, batch):
            raise RuntimeError(f"llama_decode: status {status}")

    def logits(of: int, index: int) -> np.ndarray:
        """(V,), after the token that was at this place of the last batch; overwritten by the next."""
        return np.ctypeslib.as_array(api.llama_get_logits_ith(of, index), (vocab_size,))

    def generate(prompts: list[list[int]], new_tokens: int, meter: Meter) -> None:
        length = len(prompts[0])
        if length + new_tokens > CONTEXT:
            raise UnavailableError(f"its context here is {CONTEXT} tokens a row")
        of = context(len(prompts))
        meter.ready()
        tokens = [
            (token, position, row, position == length - 1)
            for row, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        last = [0] * len(prompts)
        for start in range(0, len(tokens), CHUNK):
            chunk = tokens[start : start + CHUNK]
            decode(of, chunk)
            for i, (_, _, row, wanted) in enumerate(chunk):
                if wanted:
                    last[row] = int(logits(of, i).argmax())
                    meter.token(last[row], row)
        for step in range(new_tokens - 1):
            decode(of, [(token, length + step, row, True) for row, token in enumerate(last)])
            for row in range(len(prompts)):
                last[row] = int(logits(of, row).argmax())
                meter.token(last[row], row)

    def score(token_ids: list[int]) -> np.ndarray:
        of = context(1)
        found = np.empty((len(token_ids), vocab_size), np.float32)
        for start in range(0, len(token_ids), CHUNK):
            chunk = token_ids[start : start + CHUNK]
            decode(of, [(token, start + i, 0, True) for i, token in enumerate(chunk)])
            for i in range(len(chunk)):
                found[start + i] = logits(of, i)
        return found

    context(1)
    return Runtime(generate, score)


PEER = Peer("llama_cpp", "llama.cpp, the file's own blocks", ("llama_cpp_python",), "peers", prepare, load)
