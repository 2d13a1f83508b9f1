"""OpenVINO in float32, weights, activations and KV cache: openvino-genai's pipeline with continuous batching."""

from pathlib import Path
from typing import Any

from ..peer import Peer, Sources
from ..prepare import cached, hugging_face_folder, run_python
from ..worker import Meter, Runtime

PRECISION = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
"""Its defaults are bfloat16 where the processor has it, and a cache of 8 bits."""

CHUNK = 2048
"""Most tokens of one step; more than that of a prompt, or of a batch of prompts, is split."""


def prepare(sources: Sources) -> Path:
    """Convert the Hugging Face folder."""
    source = hugging_face_folder(sources)

    def make(folder: Path) -> None:
        run_python(sources.peers_python, ("-m", "benchmarks.openvino_model", source, folder), "OpenVINO's conversion")

    return cached(sources.work / "openvino-fp32", {"source": sources.digest, "versions": PEER.versions(sources)}, make)


def load(model: Path, threads: int) -> Runtime:
    """Its cache grows as requests need it; adding the requests is part of prefill."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    properties = PRECISION | {"INFERENCE_NUM_THREADS": threads}
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = CHUNK
    pipeline = genai.ContinuousBatchingPipeline(str(model), scheduler, "CPU", properties)
    scoring: list[Any] = []  # a second copy of the model, which gives all logits, made when it is first needed

    def generate(prompts: list[list[int]], new_tokens: int, meter: Meter) -> None:
        config = genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
        meter.ready()
        rows = [pipeline.add_request(n, ov.Tensor(np.array([ids])), config) for n, ids in enumerate(prompts)]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            for row, handle in enumerate(rows):
                while handle.can_read():
                    for output in handle.read().values():
                        for token_id in output.generated_ids:
                            meter.token(token_id, row)

    def score(token_ids: list[int]) -> np.ndarray:
        if not scoring:
            compiled = ov.Core().compile_model(model / "openvino_model.xml", "CPU", properties)
            scoring.append(compiled.create_infer_request())
        (request,) = scoring
        request.reset_state()
        inputs = {
            "input_ids": np.array([token_ids]),
            "attention_mask": np.ones((1, len(token_ids)), np.int64),
            "position_ids": np.arange(len(token_ids))[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        return np.ascontiguousarray(request.infer(inputs)["logits"][0], np.float32)

    return Runtime(generate, score)


DISTRIBUTIONS = ("openvino-genai", "openvino", "openvino-tokenizers", "transformers", "torch")
PEER = Peer("openvino", "OpenVINO fp32", DISTRIBUTIONS, "peers", prepare, load)
