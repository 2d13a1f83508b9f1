"""The file that says how an int8 cache is rounded: what is read, and what is refused."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from zonda import BundleError
from zonda.runtime import contract
from zonda.runtime.engines.cache_forms import read_forms
from zonda.runtime.manifest import StateSpec

HEADS, DIM = 2, 8
KEY, VALUE = "past_key_values.0.key", "past_key_values.0.value"


STATES = [
    StateSpec(
        input=name,
        output=name.replace("past_key_values", "present"),
        layer=0,
        kind=name.rpartition(".")[2],
        dtype="int8",
        shape=(contract.BATCH, HEADS, contract.CAPACITY, DIM),
    )
    for name in (KEY, VALUE)
]


def good() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    names = (f"{KEY}.scales", f"{VALUE}.scales", f"{VALUE}.offsets")
    return {name: draw.uniform(0.5, 2, (HEADS, DIM)).astype(np.float32) for name in names}


def test_codes_become_the_states_that_they_stand_for(tmp_path):
    tensors = good()
    save_file(tensors, tmp_path / "cache.safetensors")
    key, value = read_forms(tmp_path / "cache.safetensors", STATES)
    codes = np.random.default_rng(1).integers(-128, 128, (HEADS, 5, DIM)).astype(np.int8)
    for form, name, shifts in ((key, KEY, np.zeros((HEADS, DIM))), (value, VALUE, tensors[f"{VALUE}.offsets"])):
        for head, place, channel in ((0, 0, 0), (1, 4, 7), (1, 2, 3)):
            wanted = codes[head, place, channel] * tensors[f"{name}.scales"][head, channel] + shifts[head, channel]
            np.testing.assert_allclose(form.widen(codes)[head, place, channel], wanted, rtol=1e-6)
        np.testing.assert_array_equal(form.narrow(form.widen(codes[None]))[0], codes)
        between = form.widen(codes) + 0.4 * form.scales[:, None]
        np.testing.assert_array_equal(form.narrow(between), codes)
        assert (
            form.narrow(np.full((HEADS, 1, DIM), 1e9)).max() == form.narrow(np.full((HEADS, 1, DIM), 1e9)).min() == 127
        )


@pytest.mark.parametrize(
    ("change", "state"),
    [
        (lambda t: t.pop(f"{VALUE}.scales"), VALUE),
        (lambda t: t.update({f"{KEY}.scales": np.ones((HEADS, DIM + 1), np.float32)}), KEY),
        (lambda t: t.update({f"{KEY}.scales": np.ones((HEADS, DIM), np.float64)}), KEY),
        (lambda t: t.update({f"{VALUE}.offsets": np.ones((HEADS, 1), np.float32)}), VALUE),
    ],
    ids=["missing", "shape", "dtype", "offsets"],
)
def test_a_file_of_other_states_is_refused_by_name(tmp_path, change, state):
    tensors, path = good(), tmp_path / "cache.safetensors"
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(BundleError, match=rf"cache\.safetensors does not say how {state} \(2, 8\) is rounded"):
        read_forms(path, STATES)


@pytest.mark.parametrize("data", [b"", b"not a file of tensors", None])
def test_a_file_that_is_none_is_refused_by_name(tmp_path, data):
    path = tmp_path / "cache.safetensors"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(BundleError, match=r"cache\.safetensors is not readable"):
        read_forms(path, STATES)
