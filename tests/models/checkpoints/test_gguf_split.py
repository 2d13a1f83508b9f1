"""Models in several GGUF files: all are read, whichever is named, and sets that are not whole are refused."""

import hashlib
import shutil

import gguf
import numpy as np
import pytest
import torch
from checkpoint_files import add_value, finish, metadata, permute, weights, write_model
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zonda import CheckpointError
from zonda.models.checkpoints import open_checkpoint

COUNT = 3


def name(number: int, count: int = COUNT) -> str:
    return f"m-{number:05}-of-{count:05}.gguf"


def split(folder, changes=None, repeat: bool = False, drop: str = ""):
    """As llama-gguf-split does: metadata in the first file, tensors shared out, the counts in all."""
    whole = gguf.GGUFReader(write_model(folder / "whole.gguf", quant=Type.Q8_0))
    tensors = [t for t in whole.tensors if t.name != drop]
    for number in range(COUNT):
        writer = gguf.GGUFWriter(folder / name(number + 1), "llama")
        values = {"split.no": number, "split.count": COUNT, "split.tensors.count": len(whole.tensors)}
        if number == 0:
            values |= {key: value for key, value in metadata().items() if key != "general.architecture"}
        for key, value in (values | (changes(number) if changes else {})).items():
            if value is not None:
                add_value(writer, key, value)
        share = [*tensors[number::COUNT], *(tensors[:1] if repeat and number == 2 else [])]
        for tensor in share:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        finish(writer)
    return folder


@pytest.mark.parametrize("number", [1, 2, 3])
def test_any_part_stands_for_all(tmp_path, number):
    split(tmp_path)
    checkpoint, whole = open_checkpoint(tmp_path / name(number)), open_checkpoint(tmp_path / "whole.gguf")
    assert checkpoint.config == whole.config
    assert checkpoint.files == whole.files
    assert checkpoint.tensors == whole.tensors
    assert all(torch.equal(checkpoint.load(key), whole.load(key)) for key in whole.tensors)
    embedding = checkpoint.blocks("model.embed_tokens.weight").codes
    assert torch.equal(embedding, whole.blocks("model.embed_tokens.weight").codes)
    digests = {name(i + 1): hashlib.sha256((tmp_path / name(i + 1)).read_bytes()).hexdigest() for i in range(COUNT)}
    assert checkpoint.sha256() == digests
    assert checkpoint.source.name == name(number)


def test_what_the_gguf_package_splits_is_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=4)
    for key, value in metadata().items():
        if key != "general.architecture":
            add_value(writer, key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for key, array in weights().items():
        heads = {"q_proj": 4, "k_proj": 2}.get(key.split(".")[-2])
        writer.add_tensor(names.get_name(key, (".weight",)), permute(array, heads) if heads else array)
    finish(writer)
    parts = sorted(path.name for path in tmp_path.iterdir())
    assert parts == [name(i, 3) for i in (1, 2, 3)]
    checkpoint = open_checkpoint(tmp_path / parts[1])
    assert all(torch.equal(checkpoint.load(key), torch.from_numpy(array)) for key, array in weights().items())


def test_a_part_that_is_not_there_is_named(tmp_path):
    split(tmp_path)
    (tmp_path / name(2)).unlink()
    for number in (1, 3):
        with pytest.raises(CheckpointError, match=f"one of 3 parts, of which {name(2)} are not there"):
            open_checkpoint(tmp_path / name(number))


def test_a_part_that_is_damaged_is_named(tmp_path):
    split(tmp_path)
    data = (tmp_path / name(3)).read_bytes()
    (tmp_path / name(3)).write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=f"{name(3)}: the file is .* truncated"):
        open_checkpoint(tmp_path / name(1))


def test_a_part_that_shrinks_is_an_error_at_load(tmp_path):
    split(tmp_path)
    checkpoint = open_checkpoint(tmp_path / name(1))
    (tmp_path / name(2)).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{name(2)} changed its size"):
        [checkpoint.load(key) for key in checkpoint.tensors]


def test_a_part_under_another_name_is_refused(tmp_path):
    split(tmp_path)
    shutil.copy(tmp_path / name(1), tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="one of 3 parts, which are found by their names"):
        open_checkpoint(tmp_path / "model.gguf")
    shutil.copy(tmp_path / name(1), tmp_path / name(1, 4))
    with pytest.raises(CheckpointError, match="named as one of 4 parts, but says that it is one of 3"):
        open_checkpoint(tmp_path / name(1, 4))


LIES = {
    "another number": ({"changes": lambda _: {"split.no": 0}}, r"split\.no is 0, expected 1"),
    "another count": ({"changes": lambda n: {"split.count": 3 + (n > 1)}}, r"split\.count is 4, expected 3"),
    "no number": ({"changes": lambda n: {"split.no": None if n else 0}}, "'split.no' is None"),
    "a number that is a text": ({"changes": lambda n: {"split.no": str(n)}}, "'split.no' is '0', expected a number"),
    "a count that is a text": ({"changes": lambda _: {"split.count": "3"}}, "'split.count' is '3', expected a number"),
    "a tensor twice": ({"repeat": True}, rf"is in {name(1)} and in {name(3)}"),
    "a tensor missing": ({"drop": "blk.0.ffn_up.weight"}, "the 3 parts hold 10 tensors, but 11 are announced"),
    "another model's part": (
        {"changes": lambda n: {"llama.context_length": 128 + n}},
        rf"{name(2)}: its llama\.context_length is not that of the first part",
    ),
    "metadata in the second part alone": (
        {"changes": lambda n: {"tokenizer.chat_template": "x" if n == 1 else None}},
        rf"{name(2)}: its tokenizer\.chat_template is not that of the first part",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_parts_that_lie_are_refused(tmp_path, lie):
    options, words = LIES[lie]
    split(tmp_path, **options)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path / name(1))


@settings(
    max_examples=100,
    deadline=5000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    number=st.integers(1, COUNT),
    changes=st.lists(st.tuples(st.integers(0, 700), st.binary(min_size=1, max_size=8)), max_size=3),
    keep=st.floats(0.1, 1),
)
def test_any_damage_to_a_part_is_a_checkpoint_error_or_harmless(tmp_path, number, changes, keep):
    if not (tmp_path / "whole.gguf").exists():
        split(tmp_path)
    place = tmp_path / "damaged"
    place.mkdir(exist_ok=True)
    for part in range(1, COUNT + 1):
        data = bytearray((tmp_path / name(part)).read_bytes())
        if part == number:
            for at, new in changes:
                data[at : at + len(new)] = new
            data = data[: int(keep * len(data))]
        (place / name(part)).write_bytes(data)
    try:
        with np.errstate(all="ignore"):
            checkpoint = open_checkpoint(place / name(1))
            for key, info in checkpoint.tensors.items():
                assert checkpoint.load(key).shape == info.shape
    except CheckpointError:
        pass
