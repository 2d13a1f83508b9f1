"""Zonda: a bundle compiled from the model file, used as any user would: streamed, or a batch in one call."""

from pathlib import Path

from .. import UnavailableError
from ..peer import Peer, Sources
from ..worker import Meter, Runtime


def prepare(sources: Sources) -> Path:
    """The bundle is made beforehand, by `build_engine.py`."""
    if sources.bundle is None:
        raise UnavailableError("no bundle was given")
    return sources.bundle


def load(model: Path, threads: int) -> Runtime:
    """Rows of the KV cache are kept between requests; all setup but the parameters counts as prefill."""
    import numpy as np

    from zonda.runtime import Pipeline, SamplingParams

    pipeline = Pipeline.load(model, threads=threads)
    limits = pipeline.engine.limits

    def check_capacity(tokens: int) -> None:
        if tokens > limits.capacity:
            raise UnavailableError(f"the bundle's capacity is {limits.capacity} tokens a row")

    def generate(prompts: list[list[int]], new_tokens: int, meter: Meter) -> None:
        if len(prompts) > limits.max_batch:
            raise UnavailableError(f"the bundle takes {limits.max_batch} rows")
        check_capacity(len(prompts[0]) + new_tokens)
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        meter.ready()
        if len(prompts) > 1:
            batch(prompts, params, meter)
            return
        for chunk in pipeline.stream(prompts[0], params):
            if chunk.token_id is not None:
                meter.token(chunk.token_id)

    def batch(prompts: list[list[int]], params: SamplingParams, meter: Meter) -> None:
        """A batch is not streamed, but it asks before every step whether to go on: then the last one's tokens are
        known. Each row's prefill is a step, then each step gives every row a token.
        """
        steps: list[float] = []

        def note_the_time() -> bool:
            steps.append(meter.now())
            return False

        results = pipeline.generate(prompts, params, cancelled=note_the_time)
        steps.append(meter.now())
        for row, result in enumerate(results):
            for n, token_id in enumerate(result.token_ids):
                meter.token(token_id, row, at=steps[len(prompts) + n] if n else steps[row + 1])

    def score(token_ids: list[int]) -> np.ndarray:
        check_capacity(len(token_ids))
        engine = pipeline.engine
        cache = engine.allocate(1)
        found = np.empty((len(token_ids), limits.vocab_size), np.float32)
        for start in range(0, len(token_ids), limits.max_chunk):
            ids = np.array([token_ids[start : start + limits.max_chunk]])
            length = ids.shape[1]
            offsets, lens = np.array([start], np.int32), np.array([length], np.int32)
            with engine.lock:
                logits = engine.step(cache, 0, ids, offsets, lens, np.arange(length)[None])
                found[start : start + length] = logits[0]
        return found

    return Runtime(generate, score)


PEER = Peer("zonda", "Zonda", ("zonda", "onnxruntime", "numpy"), "zonda", prepare, load)
