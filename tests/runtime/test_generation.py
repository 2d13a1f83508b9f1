"""The generation loop on the engine double: rows, offsets, copies and the reasons to stop, without a model."""

import threading

import numpy as np
import pytest
from conftest import tiny_tokenizer

from zonda import CapacityError, EngineError, RequestError
from zonda.runtime import Pipeline, SamplingParams
from zonda.runtime.engines.memory import MemoryEngine
from zonda.runtime.manifest import Limits

VOCAB = tiny_tokenizer().get_vocab_size()
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)


def make(capacity=64, max_batch=3, max_chunk=8, **kwargs) -> Pipeline:
    limits = Limits(capacity=capacity, max_batch=max_batch, max_chunk=max_chunk, vocab_size=VOCAB)
    return Pipeline(MemoryEngine(limits), tiny_tokenizer(), **kwargs)


def oracle(pipeline: Pipeline, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation straight from the double's own definition: no cache, no rows."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(pipeline.engine.logits_after(np.array(ids)).argmax()))
    return ids[len(prompt) :]


PROMPTS = [[5, 6, 7], list(range(20, 41)), [9], [30, 31, 32, 33, 34], [8] * 17]


def test_a_single_prompt_is_chunked_and_decoded():
    pipeline = make()
    result = pipeline.generate(PROMPTS[1], GREEDY)
    assert list(result.token_ids) == oracle(pipeline, PROMPTS[1], 10)
    assert pipeline.engine.steps == [(1, 8, 1), (1, 8, 1), (1, 5, 1)] + [(1, 1, 1)] * 9
    assert result.finish_reason == "length"


def test_more_prompts_than_rows_of_different_lengths_equal_the_single_runs():
    pipeline = make()
    lengths = [4, 11, 2, 7, 9]
    params = [GREEDY.replace(max_tokens=n) for n in lengths]
    results = pipeline.generate(PROMPTS, params)
    assert [list(r.token_ids) for r in results] == [
        oracle(pipeline, p, n) for p, n in zip(PROMPTS, lengths, strict=True)
    ]
    assert max(batch for batch, _, _ in pipeline.engine.steps) == 3


def test_rows_are_reused_without_a_trace_of_earlier_calls():
    pipeline = make()
    pipeline.generate(PROMPTS, GREEDY)
    assert list(pipeline.generate(PROMPTS[2], GREEDY).token_ids) == oracle(pipeline, PROMPTS[2], 10)


def test_samples_of_one_prompt_prefill_it_once_and_differ():
    pipeline = make()
    params = SamplingParams(n=3, seed=7, max_tokens=6, ignore_eos=True)
    result = pipeline.generate(PROMPTS[1], params)
    samples = [result.token_ids, *(other.token_ids for other in result.others)]
    assert len(set(samples)) == 3
    assert pipeline.engine.computed == len(PROMPTS[1]) + 3 * 5
    again = pipeline.generate(PROMPTS[1], params)
    assert [again.token_ids, *(o.token_ids for o in again.others)] == samples


def test_more_samples_than_rows():
    pipeline = make(max_batch=2)
    result = pipeline.generate([5, 6], SamplingParams(n=5, seed=1, max_tokens=4, ignore_eos=True))
    wide = make(max_batch=8).generate([5, 6], SamplingParams(n=5, seed=1, max_tokens=4, ignore_eos=True))
    assert [o.token_ids for o in (result, *result.others)] == [o.token_ids for o in (wide, *wide.others)]


def test_stops_at_eos_and_says_so():
    pipeline = make()
    following = oracle(pipeline, [5], 6)
    stop = following[4]
    pipeline = make(eos_token_ids=[stop])
    result = pipeline.generate([5], SamplingParams(temperature=0, max_tokens=50))
    first = following.index(stop)
    assert (list(result.token_ids), result.finish_reason, result.stop_reason) == (following[: first + 1], "stop", None)
    assert pipeline.generate([5], GREEDY).finish_reason == "length"


def test_stops_at_a_stop_token_with_its_id():
    pipeline = make()
    stop = oracle(pipeline, [5], 3)[2]
    result = pipeline.generate([5], GREEDY.replace(stop_token_ids=[stop]))
    assert (result.finish_reason, result.stop_reason) == ("stop", stop)


def test_min_tokens_hold_the_end_back():
    pipeline = make()
    stop = oracle(pipeline, [5], 1)[0]
    result = pipeline.generate([5], GREEDY.replace(stop_token_ids=[stop], min_tokens=4))
    assert len(result.token_ids) >= 4
    assert stop not in result.token_ids[:4]


def test_a_stop_string_is_cut_and_never_streamed():
    pipeline = make()
    whole = pipeline.generate([5], GREEDY.replace(max_tokens=12)).text
    stop = whole[5:9]
    params = GREEDY.replace(stop=[stop], max_tokens=12)
    result = pipeline.generate([5], params)
    assert result.text == whole[: whole.index(stop)]
    assert (result.finish_reason, result.stop_reason) == ("stop", stop)
    assert "".join(chunk.text for chunk in pipeline.stream([5], params)) == result.text


def test_stops_when_the_cache_is_full():
    pipeline = make(capacity=12)
    result = pipeline.generate([5, 6, 7], SamplingParams(temperature=0, ignore_eos=True))
    assert result.finish_reason == "capacity"
    assert len(result.token_ids) == 12 - 3 + 1  # the last token needs no place


def test_a_prompt_as_long_as_the_capacity_gives_one_token():
    result = make(capacity=12).generate([5] * 12, SamplingParams(temperature=0, ignore_eos=True))
    assert (len(result.token_ids), result.finish_reason) == (1, "capacity")


def test_a_prompt_that_is_too_long_is_refused_with_the_numbers():
    with pytest.raises(CapacityError, match="13 tokens, the capacity of the engine is 12"):
        make(capacity=12).generate([5] * 13, GREEDY)


@pytest.mark.parametrize("prompt", ["", [], [VOCAB], [-1], [[]], ["", "a"], [True, False]])
def test_an_empty_or_impossible_prompt_is_refused(prompt):
    with pytest.raises(RequestError):
        make().generate(prompt, GREEDY)


def test_cancellation_ends_every_sequence_with_what_there_is():
    pipeline = make()
    calls = iter(range(100))
    results = pipeline.generate(PROMPTS, GREEDY, cancelled=lambda: next(calls) >= 5)
    assert {r.finish_reason for r in results} == {"cancelled"}
    assert list(results[0].token_ids) == oracle(pipeline, PROMPTS[0], len(results[0].token_ids))
    assert results[4].token_ids == ()


def test_closing_a_stream_gives_its_rows_back():
    pipeline = make()
    stream = pipeline.stream(PROMPTS[0], GREEDY)
    next(stream)
    stream.close()
    assert len(pipeline._free) == 1


def test_logprobs_are_the_models_own():
    pipeline = make()
    params = SamplingParams(temperature=0.5, seed=3, max_tokens=3, logprobs=2, ignore_eos=True, repetition_penalty=1.5)
    result = pipeline.generate([5, 6], params)
    ids = [5, 6]
    for token, entry in zip(result.token_ids, result.logprobs, strict=True):
        logits = pipeline.engine.logits_after(np.array(ids)).astype(np.float64)
        exact = logits - np.log(np.exp(logits).sum())
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(exact[token], abs=1e-5)
        assert [t.token_id for t in entry.top_logprobs] == np.argsort(-exact)[:2].tolist()
        ids.append(token)


def test_prompt_logprobs_cover_every_prompt_token_but_the_first():
    pipeline = make(capacity=256, max_chunk=100)
    prompt = [i % VOCAB for i in range(150)]
    result = pipeline.generate(prompt, GREEDY.replace(prompt_logprobs=1, max_tokens=1))
    assert result.prompt_logprobs[0] is None
    assert len(result.prompt_logprobs) == 150
    for position in (1, 64, 65, 149):
        logits = pipeline.engine.logits_after(np.array(prompt[:position])).astype(np.float64)
        exact = logits - np.log(np.exp(logits).sum())
        assert result.prompt_logprobs[position].logprob == pytest.approx(exact[prompt[position]], abs=1e-5)
    assert max(k for _, _, k in pipeline.engine.steps) == 64


def test_a_logits_processor_sees_the_output_and_decides():
    seen = []

    def only_nine(output, logits):
        seen.append(output)
        mask = np.full_like(logits, -np.inf)
        mask[9] = 0
        return mask

    result = make().generate([5], GREEDY.replace(max_tokens=3, logits_processors=[only_nine]))
    assert result.token_ids == (9, 9, 9)
    assert seen == [(), (9,), (9, 9)]


def test_timings_count_what_was_computed():
    timings = make().generate(PROMPTS[1], GREEDY).timings
    assert (timings.prompt_tokens, timings.cached_tokens, timings.generated_tokens) == (21, 0, 10)
    assert timings.prefill_s > 0
    assert timings.decode_tokens_per_s > 0


def test_threads_do_not_see_each_other():
    pipeline = make()
    results: dict[int, list[int]] = {}

    def work(i: int) -> None:
        results[i] = list(pipeline.generate(PROMPTS[i % 5], GREEDY).token_ids)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: oracle(pipeline, PROMPTS[i % 5], 10) for i in range(10)}


def test_a_closed_pipeline_says_so():
    pipeline = make()
    with pipeline:
        pass
    with pytest.raises(EngineError, match="closed"):
        pipeline.generate([5], GREEDY)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": np.zeros((1, 9), np.int64)}, CapacityError, "9 new tokens a row"),
        ({"offsets": np.array([60], np.int32)}, CapacityError, "a row would hold 68 tokens, the capacity is 64"),
        ({"first_row": 3}, CapacityError, "rows 3..3 of a cache of 3"),
        ({"offsets": np.array([-1], np.int32)}, EngineError, "must not be negative"),
        ({"lens": np.array([9], np.int32)}, EngineError, r"input_lens must lie in \[0, S\]"),
        ({"positions": np.array([[8]])}, EngineError, "logit_positions must lie"),
        ({"positions": np.zeros((2, 1), np.int64)}, EngineError, "uneven"),
        ({"ids": np.full((1, 8), VOCAB)}, EngineError, "input_ids must lie"),
        ({"lens": np.ones(2, np.int32)}, EngineError, "must be"),
    ],
)
def test_a_step_outside_the_contract_is_refused_before_anything_is_written(change, error, message):
    engine = make().engine
    cache = engine.allocate(3)
    arguments = {
        "first_row": 0,
        "ids": np.zeros((1, 8), np.int64),
        "offsets": np.zeros(1, np.int32),
        "lens": np.full(1, 8, np.int32),
        "positions": np.array([[7]]),
    } | change
    with pytest.raises(error, match=message):
        engine.step(
            cache,
            arguments["first_row"],
            arguments["ids"],
            arguments["offsets"],
            arguments["lens"],
            arguments["positions"],
        )
    assert (cache.tokens == -1).all()
