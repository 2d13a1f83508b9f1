"""Zonda: the bundle compiled from the model file, streamed as any user would."""

from pathlib import Path

from .. import UnavailableError
from ..peer import Peer, Sources
from ..worker import Generate, Meter


def prepare(sources: Sources) -> Path:
    """The bundle is made beforehand, by `build_engine.py`."""
    if sources.bundle is None:
        raise UnavailableError("no bundle was given")
    return sources.bundle


def load(model: Path, threads: int) -> Generate:
    """Rows of the KV cache are kept between requests; all setup but the parameters counts as prefill."""
    from zonda.runtime import Pipeline, SamplingParams

    pipeline = Pipeline.load(model, threads=threads)

    def generate(prompt_ids: list[int], new_tokens: int, meter: Meter) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        meter.ready()
        for chunk in pipeline.stream(prompt_ids, params):
            if chunk.token_id is not None:
                meter.token(chunk.token_id)

    return generate


PEER = Peer("zonda", "Zonda", ("zonda", "onnxruntime", "numpy"), "zonda", prepare, load)
