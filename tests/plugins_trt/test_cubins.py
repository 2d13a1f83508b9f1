"""Compiled kernels as data: complete or refused, and the same after a trip through a file."""

import dataclasses

import pytest

from zonda import BuildError, BundleError
from zonda.plugins_trt.cubins import Cubin, CubinLibrary, Usage, Variant

NORM = Variant("rms_norm", ("fp16", "fp16", "fp16"), (("hidden", 64),))
ROPE = Variant("rope", ("fp16",), (("heads", 2),))


def cubin(variant=NORM, capability=80):
    parameters = (("x", "*fp16"), ("eps", "fp32"))
    return Cubin(variant, capability, "rms_norm", b"ELF", parameters, (("ROWS", 1),), 4, 16, Usage(30, 0, 0))


def test_every_variant_is_there_for_every_capability():
    library = CubinLibrary((80, 90), (cubin(), cubin(capability=90)))
    assert library.variants == (NORM,)
    assert library.find(NORM, 90).capability == 90


def test_a_capability_without_its_cubins_is_refused():
    with pytest.raises(BuildError, match=r"rms_norm .*hidden 64.* not compiled for compute capability \[90\]"):
        CubinLibrary((80, 90), (cubin(),))


def test_a_cubin_that_is_there_twice_is_refused():
    with pytest.raises(BuildError, match="twice"):
        CubinLibrary((80,), (cubin(), cubin()))


def test_a_plan_is_checked_against_the_library():
    library = CubinLibrary((80,), (cubin(),))
    library.require([80], [NORM])
    with pytest.raises(BuildError, match=r"no kernels for compute capability \[120\]"):
        library.require([80, 120])
    with pytest.raises(BuildError, match=r"rope .* is not in the kernel library"):
        library.require([80], [ROPE])


def test_a_library_survives_a_file_unchanged():
    library = CubinLibrary((80,), (cubin(), cubin(ROPE)))
    data = library.to_bytes()
    assert CubinLibrary.from_bytes(data) == library
    assert data == CubinLibrary.from_bytes(data).to_bytes()


def test_damaged_bytes_are_a_bundle_error():
    data = CubinLibrary((80,), (cubin(),)).to_bytes()
    for damaged in (b"", data[:-3], b"\x00" + data[1:], b"not a library"):
        with pytest.raises(BundleError):
            CubinLibrary.from_bytes(damaged)


def test_another_schema_is_told_apart_from_damage():
    data = CubinLibrary((80,), (cubin(),)).to_bytes()
    with pytest.raises(BundleError, match="schema 2"):
        CubinLibrary.from_bytes(data[:1] + b"\x02" + data[2:])


def test_spills_are_stack_and_local_memory():
    assert dataclasses.replace(cubin().usage, stack=8, local=4).spills == 12
