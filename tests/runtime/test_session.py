"""A session keeps its KV cache between turns; what it says is what a fresh prefill of the whole history would say."""

import pytest
from conftest import TEMPLATE, tiny_tokenizer

from zonda import CapacityError, ChatTemplateError
from zonda.runtime import Pipeline, SamplingParams
from zonda.runtime.chat_template import ChatTemplate
from zonda.runtime.engines.memory import MemoryEngine
from zonda.runtime.manifest import Limits

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


def make(template: str | None = TEMPLATE, capacity: int = 512) -> Pipeline:
    tokenizer = tiny_tokenizer()
    limits = Limits(capacity=capacity, max_batch=2, max_chunk=16, vocab_size=tokenizer.get_vocab_size())
    compiled = ChatTemplate(template) if template is not None else None
    return Pipeline(MemoryEngine(limits), tokenizer, eos_token_ids=[0], template=compiled)


def test_the_history_is_not_prefilled_again():
    pipeline = make()
    session = pipeline.session()
    first = session.chat("hot wind", GREEDY)
    before = pipeline.engine.computed
    second = session.chat("and then?", GREEDY)
    assert first.timings.cached_tokens == 0
    assert second.timings.cached_tokens == first.timings.prompt_tokens + len(first.token_ids) - 1
    new = second.timings.prompt_tokens - second.timings.cached_tokens
    assert pipeline.engine.computed - before == new + len(second.token_ids) - 1


def test_turns_equal_a_fresh_run_over_the_same_tokens():
    pipeline = make()
    session = pipeline.session()
    for line in ("hot wind", "and then?", "你好"):
        answer = session.chat(line, GREEDY)
        (everything,) = (session._spoken[: len(session._spoken) - len(answer.token_ids)],)
        fresh = pipeline.generate(list(everything), GREEDY)
        assert fresh.token_ids == answer.token_ids
    assert [m["role"] for m in session.messages] == ["user", "assistant"] * 3


def test_a_template_that_rewrites_history_costs_time_not_truth():
    """This template drops all but the last message, so nothing of the cache but a common beginning can be used."""
    pipeline = make("{{ messages[-1]['content'] }}!")
    session = pipeline.session()
    session.chat("first words", GREEDY)
    answer = session.chat("other words", GREEDY)
    assert answer.token_ids == make().generate("other words!", GREEDY).token_ids


def test_a_closed_stream_leaves_what_was_said():
    pipeline = make()
    session = pipeline.session()
    stream = session.stream("hot wind", GREEDY)
    heard = next(stream).text + next(stream).text
    stream.close()
    assert session.messages[-1] == {"role": "assistant", "content": session.last.text}
    assert session.last.text.startswith(heard)
    assert session.last.finish_reason == "cancelled"
    session.chat("go on", GREEDY)
    assert len(session.messages) == 4


def test_a_refused_turn_does_not_join_the_history():
    session = make(capacity=24).session()
    session.chat("hi", GREEDY)
    before = list(session.messages)
    with pytest.raises(CapacityError):
        session.chat("a long story " * 20, GREEDY)
    assert session.messages == before


def test_without_a_template_chat_is_refused_with_the_remedy():
    with pytest.raises(ChatTemplateError, match="no chat template"):
        make(None).chat("hi", GREEDY)


def test_a_chat_with_samples_is_refused_by_a_session():
    from zonda import RequestError

    with pytest.raises(RequestError, match="n must be 1"):
        make().session().chat("hi", SamplingParams(n=2, max_tokens=2))
