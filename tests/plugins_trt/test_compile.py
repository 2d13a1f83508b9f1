"""Kernels become cubins for every compute capability, without a spill; the cache gives back what it was given."""

import re
import struct
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from zonda import BuildError
from zonda.plugins_trt import CAPABILITIES, Variant, compile_kernels
from zonda.plugins_trt import compile as compiler

HIDDEN = (64, 576, 1023, 2048, 4096, 5120, 8192, 12289, 16380, 16382, 16383, 16384)
HEADS = (  # heads, key heads, head dimension, half of the rotary dimension
    (9, 3, 64, 32),
    (32, 8, 128, 64),
    (128, 8, 128, 64),
    (32, 0, 128, 64),
    (32, 32, 80, 16),
    (71, 1, 64, 32),
    (5, 2, 10, 3),
    (64, 1, 192, 32),
    (8, 8, 256, 128),
    (16, 8, 512, 256),
)


def norms(dtype: str, hidden: int) -> list[Variant]:
    """Each norm with the gain in the type of x, and in float32."""
    sizes = (("hidden", hidden),)
    group = next(g for g in (32, 31, 1) if hidden % g == 0)
    return [
        variant
        for gain in dict.fromkeys((dtype, "fp32"))
        for variant in (
            Variant("rms_norm", (dtype, gain, dtype), sizes),
            Variant("add_rms_norm", (dtype, dtype, gain, dtype, dtype), sizes),
            Variant("q_rms_norm", (dtype, "int8", gain, dtype), (*sizes, ("group", group))),
        )
    ]


def rope(dtype: str, heads: tuple[int, int, int, int], interleaved: int) -> Variant:
    names = ("heads", "key_heads", "dim", "half")
    tensors = (dtype,) * (2 if heads[1] else 1)
    sizes = (*zip(names, heads, strict=True), ("interleaved", interleaved))
    return Variant("rope", (*tensors, "fp32", "fp32", "int64", *tensors), sizes)


def table(library) -> str:
    """The worst of each kernel and capability: registers a thread, spilled bytes, shared bytes."""
    lines = [f"{'kernel':14}{'sm':>5}{'cubins':>8}{'registers':>11}{'spills':>8}{'shared':>8}"]
    for kernel in dict.fromkeys(v.kernel for v in library.variants):
        for capability in library.capabilities:
            found = [c for c in library.cubins if (c.variant.kernel, c.capability) == (kernel, capability)]
            worst = [max(f(c) for c in found) for f in (registers, spills, shared)]
            lines.append(f"{kernel:14}{capability:5}{len(found):8}{worst[0]:11}{worst[1]:8}{worst[2]:8}")
    return "\n".join(lines)


def registers(cubin):
    return cubin.usage.registers


def spills(cubin):
    return cubin.usage.spills


def shared(cubin):
    return cubin.shared


def assert_runs_anywhere_it_should(library):
    for cubin in library.cubins:
        assert spills(cubin) == 0, (cubin.variant, cubin.capability)
        # A block must fit: 64 Ki registers, allotted to a warp in units of 256, and the static limit of shared memory.
        assert -(-registers(cubin) * 32 // 256) * 256 * cubin.num_warps <= 65536
        assert shared(cubin) <= 48 * 1024


def test_every_kernel_for_every_capability_without_a_spill(triton, capsys):
    variants = [*norms("fp16", 576), rope("fp16", HEADS[0], 0)]
    library = compile_kernels(variants, CAPABILITIES, triton)
    assert len(library.cubins) == len(variants) * len(CAPABILITIES)
    assert_runs_anywhere_it_should(library)
    with capsys.disabled():
        print(f"\n{table(library)}")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_the_whole_range_of_sizes_without_a_spill(triton, capsys, dtype):
    variants = [v for hidden in HIDDEN for v in norms(dtype, hidden)]
    variants += [rope(dtype, heads, interleaved) for heads in HEADS for interleaved in (0, 1)]
    library = compile_kernels(variants, [c for c in CAPABILITIES if c >= 80 or dtype != "bf16"], triton)
    with capsys.disabled():
        print(f"\n{dtype}\n{table(library)}")
    assert_runs_anywhere_it_should(library)


def test_a_cubin_is_for_its_capability_and_takes_two_more_pointers(triton, tmp_path):
    (cubin,) = compile_kernels([norms("fp16", 64)[0]], [89], triton).cubins
    assert cubin.image[:4] == b"\x7fELF"
    tool = Path(find_spec("triton").origin).parent / "backends/nvidia/bin/cuobjdump"
    file = tmp_path / "kernel.cubin"
    file.write_bytes(cubin.image)
    dump = subprocess.run([tool, "-elf", file], capture_output=True, text=True, check=True).stdout
    assert "sm_89" in dump
    ordinals = {int(n, 16) for n in re.findall(r"Ordinal\s*:\s*(0x[0-9a-f]+)", dump)}
    assert len(ordinals) == len(cubin.parameters) + 2
    assert cubin.function in dump


def test_what_the_launcher_needs_is_recorded(triton):
    rms_norm, _, q_rms_norm, *_ = norms("fp16", 64)
    (first, second) = compile_kernels([rms_norm, q_rms_norm], [80], triton).cubins
    assert first.parameters == (("x", "*fp16"), ("weight", "*fp16"), ("y", "*fp16"), ("eps", "fp32"), ("rows", "i32"))
    assert dict(first.constants) == {"HIDDEN": 64, "BLOCK": 64, "ROWS": 8}
    assert first.num_warps == 4
    assert [kind for _, kind in second.parameters] == ["*fp16", "*i8", "*fp16", "*fp16", "fp32"]


def test_without_k_the_kernel_has_no_pointers_for_it(triton):
    (cubin,) = compile_kernels([rope("fp16", (4, 0, 64, 32), 0)], [80], triton).cubins
    assert [name for name, _ in cubin.parameters] == ["q", "cos", "sin", "positions", "q_out", "table_rows"]


def test_the_cache_answers_without_compiling(triton, monkeypatch):
    variants = norms("fp16", 576)[:1]
    first = compile_kernels(variants, [80], triton)

    def refuse(work, jobs):
        assert not work
        return []

    monkeypatch.setattr(compiler, "_compile_all", refuse)
    assert compile_kernels(variants * 2, [80], triton) == first


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_cache_entry_is_compiled_again(triton, tmp_path, damage):
    variant = norms("fp16", 64)[0]
    first = compile_kernels([variant], [80], tmp_path)
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    file.write_bytes(damage if damage is not None else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    assert compile_kernels([variant], [80], tmp_path) == first
    assert file.read_bytes() == data


def test_a_cache_entry_depends_on_all_that_decides_the_cubin(triton):
    variant, other = norms("fp16", 64)[:2]
    keys = {
        compiler._key(variant, 80, "3.9.0"),
        compiler._key(variant, 89, "3.9.0"),
        compiler._key(variant, 80, "3.9.1"),
        compiler._key(other, 80, "3.9.0"),
    }
    assert len(keys) == 4


def test_an_unknown_capability_is_refused_before_any_work():
    with pytest.raises(BuildError, match="compute capability 70 is not known"):
        compile_kernels(norms("fp16", 64), [80, 70])


def test_bfloat16_is_refused_where_the_hardware_has_none():
    with pytest.raises(BuildError, match=r"rms_norm \[bf16.*capability 75 has no bfloat16; build with fp16"):
        compile_kernels(norms("bf16", 64), [75])


def test_a_host_without_triton_is_told_what_to_install(monkeypatch):
    def absent(name):
        raise compiler.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compiler.importlib.metadata, "version", absent)
    with pytest.raises(BuildError, match=r"zonda\[plugins\]"):
        compile_kernels(norms("fp16", 64), [80])


def test_a_kernel_that_does_not_compile_is_named(triton):
    impossible = Variant("rms_norm", ("fp16", "fp16", "fp16"), (("hidden", 2**21),))
    with pytest.raises(BuildError, match=r"rms_norm .*hidden 2097152.* does not compile for capability 80"):
        compile_kernels([impossible], [80], triton)


def test_default_cache_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.setattr(compiler.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.default_cache() == tmp_path / "zonda" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compiler.default_cache() == Path.home() / ".cache/zonda/kernels"


def test_elf_of_a_cubin_is_cuda(triton):
    (cubin,) = compile_kernels([norms("fp16", 64)[0]], [80], triton).cubins
    assert struct.unpack_from("<H", cubin.image, 18)[0] == 190  # EM_CUDA
