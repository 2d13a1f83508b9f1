"""Prompt lookup against a plain search, the choice of a draft's length, and generation with drafts against without."""

import numpy as np
import pytest
from conftest import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from zonda import RequestError
from zonda.runtime import Pipeline, SamplingParams
from zonda.runtime import generation as generation_module
from zonda.runtime.engines.memory import MemoryEngine
from zonda.runtime.manifest import Limits
from zonda.runtime.speculation import LENGTHS, PromptLookup, StepCosts, choose_length

VOCAB = tiny_tokenizer().get_vocab_size()
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)


class FixedCosts(StepCosts):
    """Steps that cost what a table says: by tokens a row."""

    def __init__(self, table: dict[int, float]) -> None:
        super().__init__()
        self.table = table

    def ratio(self, batch, length):
        return self.table[length]


FREE = FixedCosts({2: 1.0, 4: 1.0, 8: 1.0})
FLOAT32 = FixedCosts({2: 1.08, 4: 1.16, 8: 1.39})
INT4 = FixedCosts({2: 1.24, 4: 1.68, 8: 2.66})


def longest_match(tokens: list[int]) -> int:
    """Of the n-grams of 2 to 4 tokens that the tokens end with, the longest that was there before."""
    return max(
        (n for n in (2, 3, 4) if any(tokens[i : i + n] == tokens[-n:] for i in range(len(tokens) - n))), default=0
    )


@settings(max_examples=300, deadline=None)
@given(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=60), begin=st.integers(1, 60))
def test_a_draft_continues_a_longest_match(tokens, begin):
    """At the beginning and after each token: a draft's source follows an equal n-gram, and no longer one was missed."""
    begin = min(begin, len(tokens))
    lookup = PromptLookup(tokens[:begin])
    for end in range(begin, len(tokens) + 1):
        if end > begin:
            lookup.push(tokens[end - 1])
        seen, draft = tokens[:end], lookup.draft(5)
        n = longest_match(seen)
        assert bool(draft) == (n > 0)
        if draft:
            places = [i for i in range(end - n) if seen[i : i + n] == seen[-n:]]
            continuations = []
            for place in places:
                source = place + n
                continuations.append([seen[source + i % (end - source)] for i in range(5)])
            assert draft in continuations


def test_of_equal_matches_the_latest_is_continued():
    assert PromptLookup([1, 2, 3, 1, 2, 4, 1, 2]).draft(1) == [4]


def test_a_match_that_was_right_is_followed():
    lookup = PromptLookup([1, 2, 3, 4, 5, 9, 9, 1, 2])
    assert lookup.draft(3) == [3, 4, 5]
    lookup.push(3)
    assert lookup.draft(3) == [4, 5, 9]


def test_a_draft_repeats_itself_beyond_the_end():
    assert PromptLookup([7, 1, 2, 1, 2]).draft(5) == [1, 2, 1, 2, 1]


def test_hits_and_misses_move_the_odds_without_a_draft():
    lookup = PromptLookup([5, 6] * 8)
    before = lookup.odds(3)
    assert before == sorted(before, reverse=True)
    for token in [5, 6] * 10:
        lookup.push(token)
    sure = lookup.odds(3)
    assert sure[2] > 0.8 > before[2]
    assert PromptLookup([1, 2, 3]).odds(3) == []


def test_the_length_of_a_match_grows_with_each_token_that_was_right():
    """After 1 2, 3 and 4 are right: the second at a match of three tokens, which a new match of three then benefits of."""
    lookup = PromptLookup([1, 2, 3, 4, 5, 9, 1, 2])
    for token in (3, 4, 10, 1, 2, 6, 7, 1, 2, 3):  # 10, 6 and the last 3 are not what the latest place says
        lookup.push(token)
    assert lookup.draft(1) == [4]
    assert lookup.odds(1)[0] > PromptLookup([1, 2, 3, 8, 1, 2, 3]).odds(1)[0]


def test_costs_are_medians_by_shape_without_the_first_step():
    costs = StepCosts()
    assert costs.ratio(1, 8) > costs.ratio(1, 4) > costs.ratio(1, 2) > 1  # not measured yet
    for _ in range(5):
        costs.record(1, 1, 0.010)
    for seconds in (9.0, 0.011, 0.013, 5.0):
        costs.record(1, 4, seconds)
    assert costs.ratio(1, 4) == pytest.approx(1.3)
    assert costs.ratio(2, 4) == StepCosts().ratio(2, 4)


def test_a_cost_that_was_not_measured_for_long_is_an_estimate_again():
    costs = StepCosts()
    for length, seconds in ((1, 1.0), (8, 50.0)):
        for _ in range(3):
            costs.record(1, length, seconds)
    assert costs.ratio(1, 8) == pytest.approx(50)
    for _ in range(600):
        costs.record(1, 1, 1.0)
    assert costs.ratio(1, 8) == StepCosts().ratio(1, 8)


@pytest.mark.parametrize(
    ("odds", "costs", "longest", "length"),
    [
        ([[]], FREE, 8, 1),
        ([[0.9**i for i in range(1, 8)]], FLOAT32, 8, 8),
        ([[0.8**i for i in range(1, 8)]], INT4, 8, 4),
        ([[0.9**i for i in range(1, 8)]], FLOAT32, 5, 4),
        ([[0.9**i for i in range(1, 8)]], FLOAT32, 1, 1),
        ([[0.1]], FLOAT32, 8, 1),
        ([[0.3]], INT4, 8, 1),
        ([[0.4]], INT4, 8, 2),
        ([[0.9, 0.8, 0.7], [], [], []], INT4, 8, 1),
        ([[0.9, 0.8, 0.7], [0.9, 0.8, 0.7], [], []], INT4, 8, 4),
    ],
)
def test_the_length_is_what_pays_most(odds, costs, longest, length):
    """Each case by hand: (1 + expected accepted a row) / cost, against 1.05 for no drafts."""
    assert choose_length(odds, costs, longest) == length


@pytest.mark.parametrize("costs", [FLOAT32, INT4], ids=["float32", "int4"])
@pytest.mark.parametrize("symbols", [3, 5, 12, 60])
def test_where_lookups_fail_the_time_is_that_of_plain_decoding(costs, symbols):
    """Random tokens of few kinds: every pair was seen before, and what follows cannot be known."""
    tokens = np.random.default_rng(symbols).integers(0, symbols, 3000).tolist()
    lookup, time, done = PromptLookup(tokens[:100]), 0.0, 100
    while done < len(tokens):
        room = min(LENGTHS[-1], len(tokens) - done) - 1
        length = choose_length([lookup.odds(room)], costs, 8)
        draft = lookup.draft(min(length - 1, room))
        time += costs.ratio(1, length) if length > 1 else 1.0
        for drafted in (*draft, None):
            lookup.push(tokens[done])
            done += 1
            if drafted != tokens[done - 1] or done == len(tokens):
                break
    assert (len(tokens) - 100) / time > 0.97


class MarkovEngine(MemoryEngine):
    """Its logits follow from the last token and a bit of the one before, so greedy text soon repeats itself."""

    def logits_after(self, token_ids):
        return super().logits_after(np.append(token_ids[-2:-1] % 2, token_ids[-1:]))


def pipelines(capacity=120, max_batch=3, max_chunk=8, eos=()) -> tuple[Pipeline, Pipeline]:
    """The same, without and with speculation."""
    limits = Limits(capacity=capacity, max_batch=max_batch, max_chunk=max_chunk, vocab_size=VOCAB)
    plain, drafting = (Pipeline(MarkovEngine(limits), tiny_tokenizer(), eos_token_ids=eos) for _ in range(2))
    drafting.speculate = "ngram"
    return plain, drafting


@pytest.fixture(autouse=True)
def free_drafts(monkeypatch):
    """Drafts whenever there is a match, so that tests do not depend on how long steps take."""
    monkeypatch.setattr(generation_module, "StepCosts", lambda: FREE)
    monkeypatch.setattr(generation_module, "choose_length", always_draft)


def always_draft(odds, costs, longest):
    room = max(map(len, odds))
    return max((n for n in (1, *LENGTHS) if n <= min(longest, room + 1)), default=1)


def facts(result):
    """All but the time."""
    return (
        result.text,
        result.token_ids,
        result.finish_reason,
        result.stop_reason,
        result.logprobs,
        result.prompt_logprobs,
    )


def test_drafts_are_verified_in_fewer_steps():
    plain, drafting = pipelines()
    params = GREEDY.replace(max_tokens=80)
    wanted, found = plain.generate([5, 6], params), drafting.generate([5, 6], params)
    assert facts(found) == facts(wanted)
    assert found.timings.accepted_tokens > 20
    assert found.timings.accepted_tokens <= found.timings.drafted_tokens
    assert len(drafting.engine.steps) == len(plain.engine.steps) - found.timings.accepted_tokens
    assert (wanted.timings.drafted_tokens, wanted.timings.accepted_tokens) == (0, 0)


def test_each_token_is_a_chunk_of_its_own():
    plain, drafting = pipelines()
    assert list(drafting.stream([5, 6], GREEDY)) == list(plain.stream([5, 6], GREEDY))


def test_without_repeats_nothing_is_drafted():
    _, drafting = pipelines()
    result = drafting.generate([5, 6, 7], GREEDY.replace(max_tokens=3))
    assert result.timings.drafted_tokens == 0
    assert {length for _, length, _ in drafting.engine.steps[1:]} == {1}


OPTIONS = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.3, "seed": 4, "top_k": 5, "top_p": 0.9},
    {"repetition_penalty": 1.2},
    {"frequency_penalty": 0.5, "presence_penalty": -0.5, "temperature": 0.5, "seed": 1},
    {"min_tokens": 12, "ignore_eos": False, "logit_bias": {9: 4.0}},
    {"logprobs": 2, "prompt_logprobs": 1},
    {"logits_processors": [lambda output, logits: np.roll(logits, len(output) // 6)]},
]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_on_equals_off(data):
    """Any prompts with repeats, any options, any number of rows and any limits."""
    piece = st.lists(st.integers(2, 12), min_size=1, max_size=4)
    repeated = st.tuples(piece, st.integers(1, 4), piece).map(lambda p: p[0] * p[1] + p[2])
    prompts = data.draw(st.lists(repeated, min_size=1, max_size=5))
    options = data.draw(st.lists(st.sampled_from(OPTIONS), min_size=len(prompts), max_size=len(prompts)))
    most = data.draw(st.integers(1, 50))
    params = [GREEDY.replace(**{"min_tokens": 0, "max_tokens": max(most, o.get("min_tokens", 0))} | o) for o in options]
    limits = {
        "capacity": data.draw(st.integers(48, 90)),
        "max_batch": data.draw(st.integers(1, 4)),
        "max_chunk": data.draw(st.sampled_from([1, 2, 3, 4, 8, 16])),
    }
    plain, drafting = pipelines(eos=[data.draw(st.integers(2, VOCAB - 1))], **limits)
    assert [facts(r) for r in drafting.generate(prompts, params)] == [facts(r) for r in plain.generate(prompts, params)]


def repeating(plain: Pipeline, prompt: list[int]) -> tuple[int, ...]:
    """What comes after a prompt that the model continues with a repetition of itself."""
    return plain.generate(prompt, GREEDY.replace(max_tokens=80)).token_ids


def test_an_end_token_inside_a_draft_ends_the_sequence():
    plain, drafting = pipelines()
    prompt = [5, 6, *repeating(plain, [5, 6])[:45]]
    stop = repeating(plain, prompt)[3]
    params = GREEDY.replace(stop_token_ids=[stop])
    wanted, found = plain.generate(prompt, params), drafting.generate(prompt, params)
    assert facts(found) == facts(wanted)
    assert found.finish_reason == "stop"
    assert found.timings.accepted_tokens > 0


def test_a_stop_string_inside_a_draft_is_cut():
    plain, drafting = pipelines()
    prompt = [5, 6, *repeating(plain, [5, 6])[:45]]
    text = plain.generate(prompt, GREEDY).text
    params = GREEDY.replace(stop=[text[6:9]])
    wanted, found = plain.generate(prompt, params), drafting.generate(prompt, params)
    assert facts(found) == facts(wanted)
    assert (found.finish_reason, found.timings.accepted_tokens > 0) == ("stop", True)


@pytest.mark.parametrize("room", range(1, 12))
def test_drafts_end_with_the_capacity(room):
    prompt = [5, 6, *repeating(pipelines()[0], [5, 6])[:45]]
    plain, drafting = pipelines(capacity=len(prompt) + room)
    params = SamplingParams(temperature=0, ignore_eos=True)
    wanted, found = plain.generate(prompt, params), drafting.generate(prompt, params)
    assert facts(found) == facts(wanted)
    assert (found.finish_reason, len(found.token_ids)) == ("capacity", room + 1)
    assert (found.timings.accepted_tokens > 0) == (room > 1)


@pytest.mark.parametrize("most", range(1, 12))
def test_drafts_end_with_max_tokens(most):
    plain, drafting = pipelines()
    prompt = [5, 6, *repeating(plain, [5, 6])[:45]]
    params = GREEDY.replace(max_tokens=most)
    wanted, found = plain.generate(prompt, params), drafting.generate(prompt, params)
    assert facts(found) == facts(wanted)
    # All drafts were right, and none was computed after which no token is wanted.
    assert drafting.engine.computed == len(prompt) + most - 1


def test_a_session_goes_on_after_rejected_drafts():
    """What rejected drafts left in the cache lies beyond what the session counts on, and is overwritten."""
    from conftest import TEMPLATE

    from zonda.runtime.chat_template import ChatTemplate

    answers = []
    for way in (None, "ngram"):
        limits = Limits(capacity=512, max_batch=1, max_chunk=16, vocab_size=VOCAB)
        pipeline = Pipeline(MarkovEngine(limits), tiny_tokenizer(), template=ChatTemplate(TEMPLATE))
        pipeline.speculate = way
        session = pipeline.session()
        answers.append([facts(session.chat(line, GREEDY)) for line in ("hot wind", "hot wind hot wind", "dry")])
        answers[-1].append(session._tokens)
    assert answers[0] == answers[1]


def test_an_unknown_way_to_speculate_is_refused(tiny_bundle):
    for refused in ("draft", True, ""):
        with pytest.raises(RequestError, match="speculate must be 'ngram' or None"):
            Pipeline.load(tiny_bundle, speculate=refused)
    pipeline, _ = pipelines()
    with pytest.raises(RequestError, match="found 'ngrams'"):
        pipeline.speculate = "ngrams"
    assert pipeline.speculate is None


@pytest.mark.parametrize("rows", [1, 3])
def test_the_tiny_model_says_the_same(tiny_bundle, rows):
    prompts = ["the wind the wind the wind", "hot and dry wind hot and dry", "def f(x): return x + 1\ndef f(x):"][:rows]
    with (
        Pipeline.load(tiny_bundle, threads=1) as plain,
        Pipeline.load(tiny_bundle, threads=1, speculate="ngram") as drafting,
    ):
        for params in (GREEDY.replace(max_tokens=60), SamplingParams(seed=5, max_tokens=60, temperature=0.2)):
            wanted, found = plain.generate(prompts, params), drafting.generate(prompts, params)
            assert [r.token_ids for r in found] == [r.token_ids for r in wanted]
        assert sum(r.timings.drafted_tokens for r in found) > 0
