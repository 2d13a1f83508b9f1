"""safetensors: mapped as they are, and the headers that are refused."""

import json
import struct
import time
import tracemalloc

import pytest
import torch
from checkpoint_files import safetensors_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from zonda import CheckpointError
from zonda.models.checkpoints import open_checkpoint
from zonda.models.checkpoints.safetensors import SafetensorsFile

TENSORS = {
    "f32": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "f16": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "bf16": torch.tensor([[3.0]], dtype=torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "nothing": torch.zeros(0, 4),
}


def f32(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_tensors_come_back_as_they_are(folder):
    checkpoint = open_checkpoint(folder(save(TENSORS, {"format": "pt"})))
    assert {name: info.stored for name, info in checkpoint.tensors.items()} == {
        "f32": "F32", "f16": "F16", "bf16": "BF16", "scalar": "I64", "nothing": "F32",
    }  # fmt: skip
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint.load(name), tensor)
        assert (checkpoint.tensors[name].shape, checkpoint.tensors[name].dtype) == (tensor.shape, tensor.dtype)


def test_loading_maps_and_does_not_copy(folder):
    checkpoint = open_checkpoint(folder(save({"big": torch.ones(16 << 20)})))
    before = resident()
    tensor = checkpoint.load("big")
    assert resident() - before < 8 << 20
    assert tensor[-1] == 1


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


LIES = {
    "empty file": (b"", "header should have"),
    "seven bytes": (bytes(7), "header should have"),
    "header of 2^64 - 1 bytes": (b"\xff" * 8 + b"{}", "18,446,744,073,709,551,615"),
    "header longer than the file": (safetensors_bytes({}, length=100), "header should have"),
    "not UTF-8": (safetensors_bytes(b'{"\xff": 1}'), "not JSON"),
    "UTF-16": (safetensors_bytes('{"a": 1}'.encode("utf-16")), "not JSON"),
    "not JSON": (safetensors_bytes(b"{"), "not JSON"),
    "JSON 100,000 deep": (safetensors_bytes(b"[" * 100_000), "not JSON"),
    "not an object": (safetensors_bytes([1]), "not a JSON object"),
    "number of 5,000 digits": (safetensors_bytes(b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
    "name twice": (
        safetensors_bytes(
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
            b' "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
            bytes(4),
        ),
        "twice",
    ),
    "half a surrogate pair as a name": (safetensors_bytes(b'{"\\ud800": 1}'), "not JSON"),
    "entry that is a number": (safetensors_bytes({"a": 1}), "lacks"),
    "entry without a dtype": (safetensors_bytes({"a": {"shape": [], "data_offsets": [0, 4]}}, bytes(4)), "lacks"),
    "three offsets": (safetensors_bytes({"a": f32(0, 4, [1]) | {"data_offsets": [0, 2, 4]}}, bytes(4)), "lacks"),
    "unknown dtype": (safetensors_bytes({"a": f32(0, 4, [1], "F7")}, bytes(4)), "dtype 'F7'"),
    "dtype that is a list": (safetensors_bytes({"a": f32(0, 4, [1]) | {"dtype": ["F32"]}}, bytes(4)), "dtype"),
    "negative dimension": (safetensors_bytes({"a": f32(0, 4, [-1, -1])}, bytes(4)), "not negative"),
    "negative offset": (safetensors_bytes({"a": f32(-4, 0, [1])}, bytes(4)), "not negative"),
    "fraction as a dimension": (safetensors_bytes({"a": f32(0, 4, [1.0])}, bytes(4)), "integers"),
    "boolean as a dimension": (safetensors_bytes({"a": f32(0, 4, [True])}, bytes(4)), "integers"),
    "shape that is text": (safetensors_bytes({"a": f32(0, 4, []) | {"shape": "1"}}, bytes(4)), "integers"),
    "dimension of 4,000 digits": (safetensors_bytes({"a": f32(0, 4, [10**4000] * 60)}, bytes(4)), "too large"),
    "50,000 dimensions": (safetensors_bytes({"a": f32(0, 4, [1] * 50_000)}, bytes(4)), "too large"),
    "product that is 4 in 64 bits": (safetensors_bytes({"a": f32(0, 4, [2**62 + 1, 4])}, bytes(4)), "needs"),
    "product that is 0 in 64 bits": (safetensors_bytes({"a": f32(0, 0, [2**32, 2**32])}), "needs"),
    "span that does not fit the shape": (safetensors_bytes({"a": f32(0, 8, [1])}, bytes(8)), "needs 4 bytes"),
    "end before start": (safetensors_bytes({"a": f32(8, 4, [1])}, bytes(8)), "needs"),
    "end beyond the file": (safetensors_bytes({"a": f32(0, 4, [1])}, bytes(3)), "needs"),
    "tensors overlap": (safetensors_bytes({"a": f32(0, 8, [2]), "b": f32(4, 12, [2])}, bytes(12)), "begins at 4"),
    "hole": (safetensors_bytes({"a": f32(0, 4, [1]), "b": f32(8, 12, [1])}, bytes(12)), "begins at 8"),
    "bytes that belong to nothing": (safetensors_bytes({"a": f32(0, 4, [1])}, bytes(8)), "truncated or corrupt"),
    "no tensors": (safetensors_bytes({"__metadata__": {"a": "b"}}), "no tensors"),
}


@pytest.mark.parametrize("name", LIES)
def test_refuses_a_lie_in_words_and_at_no_cost(folder, name):
    data, words = LIES[name]
    path = folder(data)
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert time.perf_counter() - started < 5
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_metadata_that_the_library_refuses_is_an_error_in_words_at_load(folder):
    header = {"__metadata__": {"a": 1}, "a": f32(0, 4, [1])}
    checkpoint = open_checkpoint(folder(safetensors_bytes(header, bytes(4))))
    with pytest.raises(CheckpointError, match="a cannot be read"):
        checkpoint.load("a")


def test_says_that_a_file_is_truncated(folder):
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* needs 32 bytes; its place is 16 to 48 of 47"):
        open_checkpoint(folder(save({"a": torch.ones(4), "b": torch.ones(8)})[:-1]))


SOUND = save({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.ones(())})


@settings(
    max_examples=300, deadline=5000, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.binary(min_size=1, max_size=8)), max_size=4),
    keep=st.one_of(st.just(len(SOUND)), st.integers(0, len(SOUND))),
)
def test_any_damage_is_a_checkpoint_error_or_harmless(tmp_path, changes, keep):
    data = bytearray(SOUND)
    for at, new in changes:
        data[at : at + len(new)] = new
    check_survives(tmp_path / "m.safetensors", bytes(data[:keep]))


@settings(
    max_examples=200, deadline=5000, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    field=st.sampled_from(["dtype", "shape", "data_offsets"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    ),
)
def test_any_value_in_the_header_is_a_checkpoint_error_or_harmless(tmp_path, field, value):
    (length,) = struct.unpack("<Q", SOUND[:8])
    header = json.loads(SOUND[8 : 8 + length])
    header["b"][field] = value
    check_survives(tmp_path / "m.safetensors", safetensors_bytes(header, SOUND[8 + length :]))


def check_survives(path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        file = SafetensorsFile(path)
        for name, info in file.tensors.items():
            assert file.load(name).shape == info.shape
    except CheckpointError:
        pass
