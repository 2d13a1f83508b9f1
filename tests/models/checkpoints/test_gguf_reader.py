"""The GGUF container: what is read, and the lies that are refused."""

import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import entry, gguf_bytes, metadata, place, text, write_model
from gguf import GGMLQuantizationType
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from zonda import CheckpointError, UnsupportedArchitectureError
from zonda.models.checkpoints import open_checkpoint
from zonda.models.checkpoints.gguf_reader import read_gguf

UINT8, UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 0, 4, 6, 7, 8, 9, 10
ROW = struct.pack("<8f", *range(8))


def array(kind: int, count: int, payload: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def test_reads_what_the_gguf_package_writes(tmp_path):
    file = read_gguf(write_model(tmp_path / "m.gguf"))
    wanted = metadata() | {"llama.attention.layer_norm_rms_epsilon": 1e-05, "llama.rope.freq_base": 10_000.0}
    assert {key: file.metadata[key] for key in wanted} == wanted
    assert file.tensors["blk.0.ffn_down.weight"].shape == (32, 64)


def test_float32_metadata_become_the_decimals_their_author_wrote(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes([entry("eps", FLOAT32, struct.pack("<f", 1e-5))]))
    assert read_gguf(path).metadata["eps"] == 1e-5


@pytest.mark.parametrize("version", [2, 3])
def test_places_tensors_behind_the_aligned_header(tmp_path, version):
    path = tmp_path / "m.gguf"
    places = [place("a", [4]), place("b", [2, 2], offset=32)]
    path.write_bytes(gguf_bytes([], places, ROW[:16] + bytes(16) + ROW[16:], version=version))
    file = read_gguf(path)
    b = file.tensors["b"]
    assert (b.shape, b.type) == ((2, 2), GGMLQuantizationType.F32)
    assert file.raw(b).view("<f4").tolist() == [4, 5, 6, 7]


LIES = {
    "empty file": (b"", "too short"),
    "half a header": (gguf_bytes()[:20], "too short"),
    "another format": (b"GGML" + bytes(60), "'GGUF'"),
    "version 1": (gguf_bytes(version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(32), "little-endian"),
    "2^63 metadata entries": (gguf_bytes(entry_count=2**63), "9,223,372,036,854,775,808 metadata"),
    "2^64 - 1 tensors": (gguf_bytes(place_count=2**64 - 1), "tensors"),
    "one entry too many": (gguf_bytes([entry("a", UINT8, b"\1")], entry_count=2), "key is empty"),
    "key of 2^62 bytes": (gguf_bytes([text("k", 2**62)]), "a metadata key"),
    "text of 2^62 bytes": (gguf_bytes([entry("k", STRING, text("v", 2**62))]), "the text of k"),
    "text beyond the end": (gguf_bytes([entry("k", STRING, text("v", 4096))]), "ends inside the text of k"),
    "key that is not UTF-8": (gguf_bytes([entry(b"\xff\xfe", UINT8, b"\1")]), "UTF-8"),
    "text that is not UTF-8": (gguf_bytes([entry("k", STRING, text(b"\xc3"))]), "UTF-8"),
    "half a surrogate pair": (gguf_bytes([entry("k", STRING, text(b"\xed\xa0\x80"))]), "UTF-8"),
    "unknown value type": (gguf_bytes([entry("k", 13, bytes(8))]), "unknown type 13"),
    "unknown element type": (gguf_bytes([entry("k", ARRAY, array(99, 1, bytes(8)))]), "unknown type 99"),
    "array of 2^61 numbers": (gguf_bytes([entry("k", ARRAY, array(UINT64, 2**61))]), "elements of k"),
    "array of 2^64 - 1 texts": (gguf_bytes([entry("k", ARRAY, array(STRING, 2**64 - 1))]), "elements of k"),
    "array of arrays": (gguf_bytes([entry("k", ARRAY, array(ARRAY, 1, array(UINT8, 1, b"\1")))]), "arrays of arrays|array of arrays"),
    "arrays 5000 deep": (gguf_bytes([entry("k", ARRAY, array(ARRAY, 1) * 5000)]), "array of arrays"),
    "key twice": (gguf_bytes([entry("k", UINT8, b"\1")] * 2), "'k' appears twice"),
    "alignment 0": (gguf_bytes([entry("general.alignment", UINT32, struct.pack("<I", 0))]), "power of two"),
    "alignment 48": (gguf_bytes([entry("general.alignment", UINT32, struct.pack("<I", 48))]), "power of two"),
    "alignment 2^31": (gguf_bytes([entry("general.alignment", UINT32, struct.pack("<I", 2**31))]), "power of two"),
    "alignment as text": (gguf_bytes([entry("general.alignment", STRING, text("32"))]), "power of two"),
    "no dimensions": (gguf_bytes([], [place("a", [])]), "0 dimensions"),
    "2^32 - 1 dimensions": (gguf_bytes([], [text("a") + struct.pack("<I", 2**32 - 1)]), "4,?294,?967,?295 dimensions"),
    "dimension 0": (gguf_bytes([], [place("a", [0, 4])]), "cannot be stored"),
    "dimensions whose product is 0 in 64 bits": (gguf_bytes([], [place("a", [2**32, 2**32])], ROW), "tensors need"),
    "dimensions whose product is 8 in 64 bits": (
        gguf_bytes([], [place("a", [2**61 + 1, 8])], ROW),
        "tensors need",
    ),
    "half a block": (gguf_bytes([], [place("a", [48], kind=GGMLQuantizationType.Q8_0)], bytes(99)), "blocks of 32"),
    "unknown tensor type": (gguf_bytes([], [place("a", [4], kind=4)], ROW), "unknown tensor type 4"),
    "tensor twice": (gguf_bytes([], [place("a", [4]), place("a", [4], offset=32)], ROW * 2), "a appears twice"),
    "tensors overlap": (gguf_bytes([], [place("a", [12]), place("b", [4], offset=32)], ROW * 2), "a and b overlap"),
    "offset not aligned": (gguf_bytes([], [place("a", [4], offset=4)], ROW), "not aligned"),
    "offset beyond the end": (gguf_bytes([], [place("a", [4], offset=2**40)], ROW), "tensors need"),
    "offset that wraps to 0": (gguf_bytes([], [place("a", [4], offset=2**64 - 32)], ROW), "tensors need"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_refuses_a_lie_in_words_and_at_no_cost(tmp_path, name):
    data, words = LIES[name]
    path = tmp_path / "lie.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert time.perf_counter() - started < 5
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (entry("k", STRING, struct.pack("<Q", 4 << 30)), "at most"),
        (entry("k", ARRAY, array(UINT8, 4 << 30)), "elements, more than any model needs"),
        (entry("k", ARRAY, array(STRING, 1 << 29)), "elements, more than any model needs"),
    ],
    ids=["text", "numbers", "texts"],
)
def test_a_sparse_file_of_8_gigabytes_costs_nothing_either(tmp_path, payload, words):
    path = tmp_path / "sparse.gguf"
    path.write_bytes(gguf_bytes([payload]))
    with path.open("r+b") as file:
        file.truncate(8 << 30)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(path)
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


def test_says_how_much_of_a_truncated_file_is_missing(tmp_path):
    path = write_model(tmp_path / "m.gguf")
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 5000)
    with pytest.raises(CheckpointError, match=f"the file is {size - 5000:,} bytes, its tensors need {size - 0:,}"):
        open_checkpoint(path)


def test_a_file_that_shrinks_after_it_was_opened_is_an_error_at_load(tmp_path):
    path = write_model(tmp_path / "m.gguf")
    checkpoint = open_checkpoint(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4096)
    with pytest.raises(CheckpointError, match="changed its size"):
        checkpoint.load("model.norm.weight")


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> bytes:
    return write_model(tmp_path_factory.mktemp("sound") / "m.gguf", quant=GGMLQuantizationType.Q8_0).read_bytes()


CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)), max_size=4)


@settings(
    max_examples=200,
    deadline=5000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(changes=CHANGES, keep=st.one_of(st.just(1.0), st.floats(0, 1)), header_only=st.booleans())
@example(changes=[], keep=0.5, header_only=False)
def test_any_damage_is_a_checkpoint_error_or_harmless(tmp_path, sound, changes, keep, header_only):
    data = bytearray(sound)
    reach = min(t.offset for t in _tensors(tmp_path, sound)) if header_only else len(data)
    for where, new in changes:
        at = int(where * reach)
        data[at : at + len(new)] = new
    check_survives(tmp_path / "damaged.gguf", bytes(data[: int(keep * len(data))]))


def _tensors(tmp_path: Path, sound: bytes):
    path = tmp_path / "sound.gguf"
    if not path.exists():
        path.write_bytes(sound)
    return read_gguf(path).tensors.values()


def check_survives(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        with np.errstate(all="ignore"):  # a damaged scale may be infinite
            checkpoint = open_checkpoint(path)
            for name, info in checkpoint.tensors.items():
                tensor = checkpoint.load(name)
                assert (tensor.shape, tensor.dtype) == (info.shape, info.dtype)
    except (CheckpointError, UnsupportedArchitectureError):
        pass
