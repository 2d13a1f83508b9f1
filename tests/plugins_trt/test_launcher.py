"""The launcher against a recording driver: what is loaded, what is launched, with which arguments, and what is refused."""

import pytest

from zonda import EngineError
from zonda.plugins_trt.cubins import Cubin, CubinLibrary, Usage, Variant
from zonda.plugins_trt.launcher import Launcher

NORM = Variant("rms_norm", ("fp16",) * 3, (("hidden", 64),))
PARAMETERS = (("x", "*fp16"), ("weight", "*fp16"), ("y", "*fp16"), ("eps", "fp32"), ("rows", "i32"))


def cubin(capability, variant=NORM, parameters=PARAMETERS):
    image = f"{variant.kernel} {capability}".encode()
    return Cubin(variant, capability, "kernel", image, parameters, (("ROWS", 4),), 8, 4096, Usage(30, 0, 0))


@pytest.fixture
def launcher(driver):
    driver.kinds["kernel"] = tuple(kind for _, kind in PARAMETERS)
    return Launcher(CubinLibrary((80, 90), (cubin(80), cubin(90))), driver)


def launches(driver):
    return [call for call in driver.calls if call[0] == "launch"]


def test_a_launch_is_function_grid_block_shared_stream_and_every_argument(driver, launcher):
    launch = launcher.bind(NORM, 7, (0.5, 25))
    launch([0x1000, 0x2000, 0x3000], 0xABC)
    values = (0x1000, 0x2000, 0x3000, 0.5, 25, 0, 0)  # the compiler's two scratch pointers are null
    assert driver.calls == [
        ("load", b"rms_norm 80"),
        ("function", "module of rms_norm 80", "kernel", 4096),
        ("launch", "kernel", 7, 256, 4096, 0xABC, values),
    ]


def test_only_the_pointers_change_from_call_to_call(driver, launcher):
    """The parameter block stays where it is, so a launch allocates nothing."""
    addresses = []
    driver.launch = lambda *arguments: addresses.append(arguments[-1])
    launch = launcher.bind(NORM, 1, (1e-5, 4))
    for base in (0x1000, 0x9000):
        launch([base, base + 16, base + 32], 0)
    assert len(set(addresses)) == 1


def test_launches_do_not_disturb_each_other(driver, launcher):
    first, second = launcher.bind(NORM, 1, (0.5, 1)), launcher.bind(NORM, 2, (0.25, 2))
    first([16, 32, 48], 1)
    second([64, 80, 96], 2)
    first([16, 32, 48], 1)
    assert [call[2:] for call in launches(driver)] == [
        (1, 256, 4096, 1, (16, 32, 48, 0.5, 1, 0, 0)),
        (2, 256, 4096, 2, (64, 80, 96, 0.25, 2, 0, 0)),
        (1, 256, 4096, 1, (16, 32, 48, 0.5, 1, 0, 0)),
    ]


def test_a_kernel_is_loaded_once_a_context_and_not_while_launching(driver, launcher):
    launcher.prepare("rms_norm")
    loaded = list(driver.calls)
    launcher.bind(NORM, 1, (1e-5, 4))([16, 32, 48], 0)
    assert [call[0] for call in driver.calls[len(loaded) :]] == ["launch"]
    driver.contexts = 2
    launcher.bind(NORM, 1, (1e-5, 4))
    assert sum(call[0] == "load" for call in driver.calls) == 2


def test_the_device_gets_the_cubin_of_its_own_capability(driver, launcher):
    driver.device = 90
    launcher.prepare("rms_norm")
    assert driver.calls[0] == ("load", b"rms_norm 90")


def test_a_device_without_cubins_is_refused_in_words(driver, launcher):
    driver.device = 86
    with pytest.raises(EngineError, match=r"compute capability 86; the kernels were compiled for \[80, 90\]"):
        launcher.prepare("rms_norm")


def test_a_variant_of_another_build_is_refused(launcher):
    other = Variant("rms_norm", ("fp16",) * 3, (("hidden", 65),))
    with pytest.raises(EngineError, match=r"hidden 65.*different builds"):
        launcher.bind(other, 1, (1e-5, 4))


@pytest.mark.parametrize("pointer", [0, 0x1001, 0x1008])
def test_null_and_misaligned_pointers_are_refused_before_the_gpu_sees_them(driver, launcher, pointer):
    launch = launcher.bind(NORM, 1, (1e-5, 4))
    with pytest.raises(EngineError, match="null or not aligned to 16"):
        launch([0x1000, pointer, 0x3000], 0)
    assert not launches(driver)


def test_too_few_pointers_or_scalars_are_refused(launcher):
    with pytest.raises(EngineError, match="takes 3 pointers, not 2"):
        launcher.bind(NORM, 1, (1e-5, 4))([16, 32], 0)
    with pytest.raises(EngineError, match="do not take 1 scalars"):
        launcher.bind(NORM, 1, (1e-5,))


def test_an_empty_batch_launches_nothing(driver, launcher):
    launcher.bind(NORM, 0, (1e-5, 0))([0, 0, 0], 0)
    assert not launches(driver)


def test_close_unloads_every_module(driver, launcher):
    launcher.prepare("rms_norm")
    launcher.close()
    assert driver.calls[-1] == ("unload", "module of rms_norm 80")
    launcher.close()
    assert sum(call[0] == "unload" for call in driver.calls) == 1
