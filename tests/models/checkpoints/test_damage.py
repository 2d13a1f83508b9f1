"""Mutated and truncated checkpoints of every format: each ends in a typed error, or loads in the forms it speaks of.

What is damaged is structure: headers, indices, configurations. None of it may crash, hang, or take memory or time that
the files do not account for. (A flipped weight is no structure: no format here carries a checksum of its weights.)
"""

import json
import resource
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from adapters import factors, write_adapter
from checkpoint_files import safetensors_bytes, write_model
from conftest import TINY, write_folder
from gguf import GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantised_files import requantise_folder
from safetensors.torch import load_file, save_file

from zonda import ZondaError
from zonda.models import registry
from zonda.models.checkpoints import open_checkpoint
from zonda.models.checkpoints.lora import merge_adapters
from zonda.models.loading import check_sizes, match_parameters
from zonda.models.quantize import quantize_modules, quantized_forms
from zonda.models.stacking import stacked

EXAMPLES = 60
SECONDS, BYTES = 5, 1 << 30
HEADER = 4096  # bytes of a GGUF in which damage is more likely: metadata


def read(folder: Path) -> None:
    """All that a build does with a checkpoint before it exports, and every weight loaded once."""
    (source,) = [*folder.glob("*.gguf")] or [folder / "base" if (folder / "base").is_dir() else folder]
    adapter = folder / "adapter"
    checkpoint = open_checkpoint(source)
    checkpoint = merge_adapters(checkpoint, [(adapter, 1.0)] if adapter.is_dir() else [])
    architecture = registry.of_config(checkpoint.config)
    checkpoint = stacked(checkpoint, architecture.stacks)
    check_sizes(checkpoint)
    config = architecture.read_config(checkpoint.config)
    with torch.device("meta"):
        module = architecture.for_rows(config, min(config.max_position_embeddings, 4096), 16)
    quantize_modules(module, quantized_forms(module, checkpoint))
    match_parameters(module, checkpoint, architecture.ignored)
    for name, info in checkpoint.tensors.items():
        tensor, blocks = checkpoint.load(name), checkpoint.blocks(name)
        assert (tensor.shape, tensor.dtype) == (info.shape, info.dtype)
        assert (blocks.form if blocks else None) == info.form


def write_sound(kind: str, place: Path) -> None:
    """A checkpoint of one kind."""
    base = write_folder(place / "base")
    if kind == "sharded":
        tensors = load_file(base / "model.safetensors")
        names = sorted(tensors)
        shards = {"one.safetensors": names[:9], "two.safetensors": names[9:]}
        for file, members in shards.items():
            save_file({name: tensors[name] for name in members}, base / file)
        index = {"metadata": {"total_size": 1}, "weight_map": {n: file for file, ns in shards.items() for n in ns}}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
        (base / "model.safetensors").unlink()
    elif kind == "adapter":
        size = (TINY["hidden_size"],) * 2
        made = factors({f"model.layers.{layer}.self_attn.q_proj": size for layer in (0, 1)})
        write_adapter(place / "adapter", made, target_modules=["q_proj"], rank_pattern={"q_proj": 4})
    elif kind == "gguf":
        for file in (*base.iterdir(),):
            file.unlink()
        base.rmdir()
        write_model(place / "m.gguf", quant=GGMLQuantizationType.Q4_1)
    elif kind != "folder":
        requantise_folder(base, place / "packed", kind)
        for file in (place / "packed").iterdir():
            file.replace(base / file.name)
        (place / "packed").rmdir()


KINDS = ["folder", "sharded", "gptq", "act-order", "awq", "fp8", "adapter", "gguf"]


@pytest.fixture(scope="module", params=KINDS)
def sound(request, tmp_path_factory) -> dict[str, bytes]:
    """File -> content."""
    place = tmp_path_factory.mktemp("sound")
    write_sound(request.param, place)
    read(place)
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.sampled_from([2**31, 2**63, 10**30, -(2**63), 1e308, 0.5])
    | st.text(max_size=4) | st.sampled_from(["F32", "I32", "F8_E4M3", "gptq", "awq", "block", "float"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip
FIGURES = [b"0", b"9", b"-", b"99", b'"', b"}", b"]", b",", b"null", b"1e9"]
FRACTION = st.floats(0, 1, exclude_max=True)
MUTATIONS = st.one_of(
    st.tuples(st.just("value"), FRACTION, VALUES),
    st.tuples(st.just("remove"), FRACTION, st.none()),
    st.tuples(st.just("rename"), FRACTION, st.text(max_size=4)),
    st.tuples(st.just("cut"), FRACTION, st.none()),
    st.tuples(st.just("bytes"), FRACTION, st.binary(min_size=1, max_size=8) | st.sampled_from(FIGURES)),
)


def mutate(name: str, data: bytes, kind: str, where: float, what: object) -> bytes:
    """A damaged file: of a safetensors file the header, of a GGUF the metadata, of JSON anything."""
    if kind == "cut":
        return data[: int(where * len(data))]
    if name.endswith(".gguf"):
        at = int(where * min(HEADER, len(data)))
        new = what if isinstance(what, bytes) else struct.pack("<Q", hash(repr(what)) % 2**64)
        return data[:at] + new + data[at + len(new) :]
    header, rest = data, b""
    if name.endswith(".safetensors"):
        (length,) = struct.unpack("<Q", data[:8])
        header, rest = data[8 : 8 + length], data[8 + length :]
    if kind == "bytes":
        at = int(where * len(header))
        header = header[:at] + what + header[at + len(what) :]
    else:
        value = json.loads(header)
        places = list(walk(value))
        parent, key = places[int(where * len(places))]
        if kind == "value":
            parent[key] = what
        elif kind == "rename" and isinstance(parent, dict):
            parent[what] = parent.pop(key)
        else:
            del parent[key]
        header = json.dumps(value).encode()
    return safetensors_bytes(header, rest) if name.endswith(".safetensors") else header


def walk(value: object) -> Iterator[tuple[dict | list, str | int]]:
    """Every (container, key) in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(inside):
        yield value, key
        yield from walk(child)


@contextmanager
def limited() -> Iterator[None]:
    """Fail where the time or the memory of a damaged file exceeds the bounds."""

    def expire(number, frame):
        raise AssertionError(f"took more than {SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data(), mutations=st.lists(MUTATIONS, min_size=1, max_size=3))
def test_damage_is_a_typed_error_or_harmless(tmp_path_factory, sound, data, mutations):
    place = tmp_path_factory.mktemp("damaged")
    files = dict(sound)
    damaged = data.draw(
        st.sampled_from([n for n in files if not n.endswith(("tokenizer.json", "tokenizer_config.json"))])
    )
    for mutation in mutations:
        try:
            files[damaged] = mutate(damaged, files[damaged], *mutation)
        except (ValueError, IndexError, struct.error):  # what an earlier mutation left is no JSON any more
            break
    for name, content in files.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(content)
    with limited(), suppress(ZondaError):
        read(place)


def test_there_are_enough_examples():
    assert len(KINDS) * EXAMPLES >= 300


@pytest.mark.parametrize("kind", ["folder", "gptq", "fp8", "adapter", "gguf"])
def test_every_truncation_of_a_weight_file_is_a_typed_error(tmp_path, kind):
    write_sound(kind, tmp_path)
    for path in [*tmp_path.rglob("*.safetensors"), *tmp_path.rglob("*.gguf")]:
        content = path.read_bytes()
        for keep in (0, 7, 8, 9, 100, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:keep])
            with limited(), pytest.raises(ZondaError):
                read(tmp_path)
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9), ("hidden_size", 2**62), ("intermediate_size", 2**62), ("vocab_size", 2**62),
        ("head_dim", 2**62), ("num_attention_heads", 10**9), ("num_key_value_heads", 10**9),
    ],
)  # fmt: skip
def test_a_damaged_size_is_refused_before_a_model_of_that_size_is_built(tmp_path, key, value):
    base = write_folder(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {key: value}))
    with limited(), pytest.raises(ZondaError, match=f"{key} is {value}, its weights allow"):
        read(tmp_path)
