"""Plugins of a plan: registered before it is read, gone with the engine, and their failures told with the node."""

import pytest
from engine_steps import decode

from zonda import BundleError, EngineError
from zonda.plugins_trt.cubins import Cubin, CubinLibrary, Usage, Variant

NODES = (("RmsNorm", {"eps": 1e-5}),)


@pytest.fixture
def kernels():
    variant = Variant("rms_norm", ("fp32",) * 3, (("hidden", 64),))
    parameters = (("x", "*fp32"), ("weight", "*fp32"), ("y", "*fp32"), ("eps", "fp32"), ("rows", "i32"))
    cubin = Cubin(variant, 89, "kernel", b"image", parameters, (("ROWS", 4),), 8, 4096, Usage(30, 0, 0))
    return CubinLibrary((89,), (cubin,)).to_bytes()


def test_they_are_registered_before_the_plan_is_read_and_gone_afterwards(open_plan, trt, kernels):
    engine = open_plan(plugins=NODES, engine_options={"cubins": kernels, "plugins": ("RmsNorm",)})
    decode(engine, engine.allocate(1), [1], 0)
    creators = trt.get_plugin_registry().creators
    assert [name for name, _, _ in creators] == ["RmsNorm"]
    engine.close()
    assert not creators


def test_a_plan_without_its_kernels_is_refused_with_the_plugins_name(open_plan):
    with pytest.raises(EngineError, match="Cannot find plugin: RmsNorm"):
        open_plan(plugins=NODES)


def test_kernels_are_unloaded_with_the_engine(open_plan, trt, cuda, kernels):
    engine = open_plan(plugins=NODES, engine_options={"cubins": kernels, "plugins": ("RmsNorm",)})
    creator = trt.get_plugin_registry().get_creator("RmsNorm", "1", "zonda")
    trt.during_execution.append(lambda _: creator.around.launcher().prepare("rms_norm"))
    decode(engine, engine.allocate(1), [1], 0)
    assert list(cuda.modules.values()) == [b"image"]
    engine.close()
    assert not cuda.modules


def test_a_plugin_that_fails_in_a_step_is_an_error_with_its_node(open_plan, trt, kernels):
    engine = open_plan(plugins=NODES, engine_options={"cubins": kernels, "plugins": ("RmsNorm",)})
    failures = trt.get_plugin_registry().get_creator("RmsNorm", "1", "zonda").around.failures

    def fail(context):
        failures.entries.append(("layers_0_norm", "enqueue", EngineError("no kernel")))
        return False

    trt.during_execution.append(fail)
    with pytest.raises(EngineError, match="node layers_0_norm: no kernel"):
        decode(engine, engine.allocate(1), [1], 0)


def test_attributes_of_another_build_are_an_error_with_the_node(open_plan, kernels):
    options = {"cubins": kernels, "plugins": ("RmsNorm",)}
    with pytest.raises(EngineError, match="node of RmsNorm: RmsNorm has no attribute 'epsilon'"):
        open_plan(plugins=[("RmsNorm", {"epsilon": 1e-5})], engine_options=options)


def test_damaged_kernels_are_refused(open_plan, cuda):
    with pytest.raises(BundleError, match="kernel library is damaged"):
        open_plan(plugins=NODES, engine_options={"cubins": b"xx", "plugins": ("RmsNorm",)})
    assert cuda.live() == 0
