"""transformers, eager fp32: `generate` with a streamer, no compilation, its default attention."""

from pathlib import Path
from typing import Any

from ..peer import Peer, Sources
from ..prepare import hugging_face_folder
from ..worker import Meter, Runtime


def load(model: Path, threads: int) -> Runtime:
    """The KV cache grows inside `generate`; nothing is setup."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.generation.streamers import BaseStreamer

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    AutoTokenizer.from_pretrained(model)  # not needed here, but part of a load that can serve text
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    class MeterStreamer(BaseStreamer):
        """Hands tokens to the meter; `generate` streams the prompt first, as one piece."""

        def __init__(self, meter: Meter) -> None:
            self._meter = meter
            self._prompt_seen = False

        def put(self, value: Any) -> None:
            if self._prompt_seen:
                for row, token_id in enumerate(value.tolist()):
                    self._meter.token(token_id, row)
            self._prompt_seen = True

        def end(self) -> None:
            pass

    def generate(prompts: list[list[int]], new_tokens: int, meter: Meter) -> None:
        ids = torch.tensor(prompts)
        loaded.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            streamer=MeterStreamer(meter),
        )

    def score(token_ids: list[int]) -> Any:
        with torch.inference_mode():
            return loaded(torch.tensor([token_ids])).logits[0].numpy()

    return Runtime(generate, score)


def prepare(sources: Sources) -> Path:
    """It loads the Hugging Face folder."""
    return hugging_face_folder(sources)


PEER = Peer("transformers", "transformers eager fp32", ("transformers", "torch"), "peers", prepare, load)
