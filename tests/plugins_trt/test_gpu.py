"""What only a GPU can show: each cubin computes what the eager marker computes, directly and from a captured graph."""

import pytest
import torch

from zonda.models import ops
from zonda.plugins_trt import compile_kernels
from zonda.plugins_trt.add_rms_norm import AddRmsNorm
from zonda.plugins_trt.cuda import CudaDriver
from zonda.plugins_trt.launcher import Launcher
from zonda.plugins_trt.marker import Tensor
from zonda.plugins_trt.q_rms_norm import QRmsNorm
from zonda.plugins_trt.rms_norm import RmsNorm
from zonda.plugins_trt.rope import RoPE

pytestmark = pytest.mark.gpu

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.int8: "int8", torch.int64: "int64"}


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Gpu:
    """Device memory by hand: no torch with CUDA is needed."""

    def __init__(self, cuda):
        self.cuda = cuda

    def __call__(self, name, *arguments):
        status, *results = getattr(self.cuda, name)(*arguments)
        assert status == self.cuda.CUresult.CUDA_SUCCESS, (name, status)
        return results[0] if results else None

    def upload(self, tensor: torch.Tensor) -> int:
        tensor = tensor.contiguous()
        pointer = self("cuMemAlloc", tensor.nbytes)
        self("cuMemcpyHtoD", pointer, tensor.data_ptr(), tensor.nbytes)
        return int(pointer)

    def download(self, pointer: int, like: torch.Tensor) -> torch.Tensor:
        result = torch.empty_like(like)
        self("cuMemcpyDtoH", result.data_ptr(), pointer, result.nbytes)
        return result


@pytest.fixture(scope="module")
def gpu():
    cuda = pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed: pip install -e '.[rtx]'")
    try:
        (status,) = cuda.cuInit(0)
    except RuntimeError as error:
        pytest.skip(f"no NVIDIA driver: {error}")
    if status != cuda.CUresult.CUDA_SUCCESS:
        pytest.skip(f"no NVIDIA GPU: {status.name}")
    found = Gpu(cuda)
    found("cuCtxSetCurrent", found("cuDevicePrimaryCtxRetain", found("cuDeviceGet", 0)))
    return found


def cases(dtype: torch.dtype):
    """Node, inputs, and the eager result of the same inputs in float64."""
    gain, eps = normal(1, 577).to(dtype), 1e-5
    x, residual = normal(2, 2, 3, 577).to(dtype), normal(3, 2, 3, 577).to(dtype)
    yield RmsNorm(eps), [x, gain], [ops.rms_norm(x.double(), gain.double(), eps)]
    total = x + residual
    yield AddRmsNorm(eps), [x, residual, gain], [ops.rms_norm(total.double(), gain.double(), eps), total.double()]
    codes = torch.randint(-128, 128, (18, 32), generator=torch.Generator().manual_seed(4), dtype=torch.int8)
    wide, steps = normal(5, 2, 3, 576).to(dtype), (normal(6, 18) / 100).to(dtype)
    yield QRmsNorm(eps), [wide, codes, steps], [ops.q_rms_norm(wide.double(), codes, steps.double(), eps)]
    angles, positions = normal(7, 50, 16), torch.tensor([[4, 5, 6], [47, 48, 49]])
    q, k = normal(8, 2, 3, 9 * 40).to(dtype), normal(9, 2, 3, 3 * 40).to(dtype)
    tables = angles.cos(), angles.sin()
    for interleaved in (0, 1):
        turned = ops.rope(q.double(), k.double(), *(t.double() for t in tables), positions, 9, 3, bool(interleaved))
        yield RoPE(9, 3, interleaved, 32), [q, k, *tables, positions], list(turned)


def check(found: torch.Tensor, wanted: torch.Tensor) -> None:
    info = torch.finfo(found.dtype)
    tolerance = 2e-6 if found.dtype == torch.float32 else info.eps
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cubins_compute_the_marker_and_replay_from_a_graph(gpu, triton, dtype):
    driver = CudaDriver()
    stream = gpu("cuStreamCreate", gpu.cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)
    for node, inputs, wanted in cases(DTYPES[dtype]):
        described = [Tensor(tuple(t.shape), NAMES[t.dtype]) for t in inputs]
        variant = node.variant(described)
        launcher = Launcher(compile_kernels([variant], [driver.capability()], triton), driver)
        programs = node.programs(described, dict(launcher.cubin(variant).constants))
        launch = launcher.bind(variant, programs, node.scalars(described))
        sources = [inputs[source] for source in node.output_sources()]
        pointers = [gpu.upload(t) for t in (*inputs, *(torch.full_like(s, float("nan")) for s in sources))]
        results = list(zip(pointers[len(inputs) :], sources, wanted, strict=True))

        launch(pointers, int(stream))
        gpu("cuStreamSynchronize", stream)
        for pointer, source, expected in results:
            check(gpu.download(pointer, source), expected)

        gpu("cuStreamBeginCapture", stream, gpu.cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL)
        launch(pointers, int(stream))
        graph = gpu("cuGraphInstantiate", gpu("cuStreamEndCapture", stream), 0)
        for pointer, source, _ in results:
            gpu("cuMemsetD8", pointer, 0xFF, source.nbytes)
        gpu("cuGraphLaunch", graph, stream)
        gpu("cuStreamSynchronize", stream)
        for pointer, source, expected in results:
            check(gpu.download(pointer, source), expected)
        launcher.close()
