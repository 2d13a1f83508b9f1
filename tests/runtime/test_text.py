"""Text from tokens: streamed and whole decoding agree for every kind of tokenizer, and no stop string leaks."""

import functools
import timeit

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from zonda.runtime.text import Detokenizer, StopStrings, TokenTexts

CORPUS = [
    "the wind comes down from the mountains, hot and dry",
    "¿qué día es hoy? El viento zonda sopla",
    "你好，世界。今天风很大。",
    "風が強い。山から吹き下ろす。",
    "Привет, мир! Ветер с гор.",
    "مرحبا بالعالم",
    "👩‍👩‍👧‍👦 family 🌬️ wind 🏔️ 🇦🇷",
    "def f(x):\n    return x + 1\n",
]
SPECIAL = ["<|end|>", "<|start|>"]


@functools.cache
def byte_level() -> Tokenizer:
    """Like GPT-2's: every id is some bytes; a character may take several ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("naïve€", special=False)])
    return tokenizer


@functools.cache
def byte_fallback() -> Tokenizer:
    """Like Llama 2's: words begin with ▁, what has no piece is written in byte tokens, a leading space is stripped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", "▁the", "▁wind", "s", "▁a", "b", "é", "你", "\ufffd", "▁你", "\u200b"]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.Replace("\u200b", ""),  # a token without any text
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


@functools.cache
def metaspace() -> Tokenizer:
    """Like T5's: the decoder drops the first ▁ only."""
    tokenizer = Tokenizer(
        models.Unigram([(p, -1.0) for p in ["<pad>", "▁", "▁the", "▁wind", "s", "é", "▁▁"]], 0, False)
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>"])
    return tokenizer


TOKENIZERS = {"byte_level": byte_level, "byte_fallback": byte_fallback, "metaspace": metaspace}


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    detokenizer = Detokenizer(TokenTexts(tokenizer))
    return "".join(detokenizer.push(i) for i in ids) + detokenizer.flush()


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_ids_add_up_to_the_whole_decoding(kind, data):
    """Random ids are mostly malformed bytes, with special tokens and ids beyond the vocabulary among them."""
    tokenizer = TOKENIZERS[kind]()
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() + 3), max_size=40))
    assert streamed(tokenizer, ids) == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_runs_of_bytes_add_up_to_the_whole_decoding(data):
    """Few ids, chosen to begin, continue and break characters, for long runs of what is unfinished."""
    kind = data.draw(st.sampled_from(["byte_level", "byte_fallback"]))
    tokenizer = TOKENIZERS[kind]()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "byte_fallback":
        names = ["<0xE4>", "<0xBD>", "<0xA0>", "<0xF0>", "<0x9F>", "<0x41>", "<s>", "▁", "▁a", "\ufffd", "\u200b"]
    else:
        byte_names = {bytes([b]): n for n, b in _byte_names(alphabet).items()}
        names = [byte_names[b] for b in (b"\xe4", b"\xbd", b"\xa0", b"\xf0", b"\x9f", b"A")] + ["<|end|>", "<tool>"]
    choices = [tokenizer.token_to_id(name) for name in names]
    assert None not in choices
    ids = data.draw(st.lists(st.sampled_from(choices), max_size=30))
    assert streamed(tokenizer, ids) == tokenizer.decode(ids, skip_special_tokens=True)


def _byte_names(alphabet: list[str]) -> dict[str, int]:
    """GPT-2's printable name of each byte: itself, or the next free letter from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    assert set(names) == set(alphabet)
    return names


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
@example("👩‍👩‍👧‍👦🌬️ 你好 é")
def test_real_text_is_never_shown_in_part_characters(text):
    tokenizer = byte_level()
    detokenizer = Detokenizer(TokenTexts(tokenizer))
    parts = [detokenizer.push(i) for i in tokenizer.encode(text).ids]
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) + detokenizer.flush() == text


def test_a_whole_character_is_shown_with_the_token_that_completes_it():
    tokenizer = byte_level()
    ids = tokenizer.encode("a✈b").ids  # ✈ is not in the corpus: three tokens of one byte
    detokenizer = Detokenizer(TokenTexts(tokenizer))
    assert [detokenizer.push(i) for i in ids] == ["a", "", "", "✈", "b"]
    assert detokenizer.flush() == ""


def test_words_are_shown_at_once_with_their_spaces():
    tokenizer = byte_fallback()
    ids = [tokenizer.token_to_id(piece) for piece in ("<s>", "▁the", "▁wind", "s", "▁▁", "▁a")]
    detokenizer = Detokenizer(TokenTexts(tokenizer))
    assert [detokenizer.push(i) for i in ids] == ["", "the", " wind", "s", "  ", " a"]


def test_a_run_of_byte_tokens_is_shown_when_it_has_ended():
    """Until then a malformed byte may still turn the whole run, the letter A included, into replacement characters."""
    tokenizer = byte_fallback()
    ids = [tokenizer.token_to_id(piece) for piece in ("<0x41>", "<0xE4>", "<0xBD>", "<0xA0>", "s")]
    detokenizer = Detokenizer(TokenTexts(tokenizer))
    assert [detokenizer.push(i) for i in ids] == ["", "", "", "", "A你s"]
    assert streamed(tokenizer, ids[:2]) == tokenizer.decode(ids[:2]) == "\ufffd\ufffd"


def test_malformed_bytes_are_shown_while_more_follow():
    """All but the last replacement character are final, so a stream of garbage does not wait for its end."""
    tokenizer = byte_level()
    first = tokenizer.token_to_id("ä")  # byte 0xE4, which begins a character
    detokenizer = Detokenizer(TokenTexts(tokenizer))
    assert [detokenizer.push(first) for _ in range(4)] == ["", "\ufffd", "\ufffd", "\ufffd"]
    assert detokenizer.flush() == "\ufffd"


def test_an_unfinished_end_comes_out_with_flush_and_only_once():
    tokenizer = byte_level()
    ids = tokenizer.encode("a✈").ids
    detokenizer = Detokenizer(TokenTexts(tokenizer))
    assert "".join(detokenizer.push(i) for i in ids[:-1]) == "a"
    assert (detokenizer.flush(), detokenizer.flush()) == ("\ufffd", "")


def test_special_tokens_and_unknown_ids_have_no_text():
    tokenizer = byte_level()
    detokenizer = Detokenizer(TokenTexts(tokenizer))
    end, wind = tokenizer.token_to_id("<|end|>"), tokenizer.encode("w").ids[0]
    assert [detokenizer.push(i) for i in (end, 10**6, wind, end, 2**31, wind)] == ["", "", "w", "", "", "w"]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_time_of_a_token_does_not_grow_with_the_text(kind):
    """After 3,000 tokens, garbage or not, a token takes some 10 µs; to decode all of them again would take 300."""
    tokenizer = TOKENIZERS[kind]()
    size = tokenizer.get_vocab_size()
    names = {"byte_level": "ä", "byte_fallback": "<0xE4>", "metaspace": "▁"}
    for ids in ([tokenizer.token_to_id(names[kind])] * 3000, [i % size for i in range(3000)], [0] * 3000):
        detokenizer = Detokenizer(TokenTexts(tokenizer))
        for i in ids:
            detokenizer.push(i)
        taken = min(timeit.repeat(lambda d=detokenizer, i=ids[0]: d.push(i), number=20, repeat=5)) / 20
        assert taken < 100e-6


def naive_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The shortest beginning of the text that ends in a stop string decides; of several the longest is cut off."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


chunks_of = st.lists(st.text("abc", max_size=5), max_size=12)
some_stops = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4, unique=True)


@settings(max_examples=1000, deadline=None)
@given(chunks=chunks_of, stops=some_stops)
@example(chunks=["ab", "ab", "c"], stops=["ababc", "ba"])
@example(chunks=["aab"], stops=["aab", "ab", "b"])
def test_any_chunking_is_cut_as_the_whole_text_is(chunks, stops):
    expected, reason = naive_stop("".join(chunks), stops)
    cutter = StopStrings(stops)
    shown = ""
    for chunk in chunks:
        emitted, stopped = cutter.push(chunk)
        shown += emitted
        assert expected.startswith(shown)  # what is out is never taken back
        if stopped is not None:
            assert (shown, stopped) == (expected, reason)
            return
    assert reason is None
    assert shown + cutter.flush() == expected


@settings(max_examples=500, deadline=None)
@given(chunks=chunks_of, stops=some_stops)
def test_no_more_is_held_back_than_could_begin_a_stop_string(chunks, stops):
    cutter = StopStrings(stops)
    text = shown = ""
    for chunk in chunks:
        emitted, stopped = cutter.push(chunk)
        text, shown = text + chunk, shown + emitted
        if stopped is not None:
            return
        held = text[len(shown) :]
        begins = [n for n in range(len(text) + 1) if any(stop.startswith(text[len(text) - n :]) for stop in stops)]
        assert len(held) == max(begins)


def test_a_stop_string_over_several_pieces_never_shows_a_part():
    cutter = StopStrings(["<|user|>"])
    assert [cutter.push(part) for part in ("hi <", "|us", "e", "r|> more")] == [
        ("hi ", None),
        ("", None),
        ("", None),
        ("", "<|user|>"),
    ]


def test_what_turns_out_not_to_be_a_stop_string_is_shown():
    cutter = StopStrings(["<|user|>"])
    assert cutter.push("a <|us") == ("a ", None)
    assert cutter.push("b") == ("<|usb", None)
    assert cutter.push("<") == ("", None)
    assert cutter.flush() == "<"
    assert cutter.flush() == ""


def test_without_stop_strings_text_passes():
    cutter = StopStrings([])
    assert cutter.push("anything") == ("anything", None)
    assert cutter.flush() == ""


def test_a_known_token_is_not_decoded_again():
    texts = TokenTexts(byte_level())
    ids = byte_level().encode("a✈b").ids
    assert [texts.of(i) for i in ids] == ["a", None, None, None, "b"]
    texts.tokenizer = None  # whatever would be decoded now, fails
    detokenizer = Detokenizer(texts)
    assert [detokenizer.push(i) for i in (ids[0], ids[-1], ids[0])] == ["a", "b", "a"]


@pytest.mark.parametrize("tokenizer", [byte_fallback, metaspace])
def test_texts_that_depend_on_neighbours_are_not_kept(tokenizer):
    assert TokenTexts(tokenizer()).of(2) is None
