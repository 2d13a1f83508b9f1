"""Compiled kernels as data: what a bundle stores and a serving host loads. Knows neither Triton nor TensorRT."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from .. import BuildError, BundleError

CAPABILITIES = (75, 80, 86, 89, 90, 100, 120, 121)
"""Compute capabilities that cubins can be compiled for: major * 10 + minor."""

_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Variant:
    """What one plugin node asks of its kernel: everything that is fixed when the engine is built.

    kernel: name of the kernel, and of its file in `kernels/`.
    dtypes: element type of each tensor, inputs then outputs: fp16, bf16, fp32, int8 or int64.
    sizes: named static sizes, in the kernel's own order.
    """

    kernel: str
    dtypes: tuple[str, ...]
    sizes: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {value}" for name, value in self.sizes)
        return f"{self.kernel} [{' '.join(self.dtypes)}; {sizes}]"


@dataclass(frozen=True, slots=True)
class Usage:
    """What `cuobjdump -res-usage` says of a cubin. registers: a thread. stack, local: bytes a thread."""

    registers: int
    stack: int
    local: int

    @property
    def spills(self) -> int:
        """Bytes a thread that do not fit in registers."""
        return self.stack + self.local


@dataclass(frozen=True, slots=True)
class Cubin:
    """One variant compiled for one compute capability.

    function: symbol in the image.
    image: the ELF that `cuModuleLoadData` takes.
    parameters: (name, type) of the run-time parameters in order; a type starts with `*` for a pointer. The image
        takes two more pointers after them (the compiler's scratch), which must be null.
    constants: the block sizes and switches compiled in; the launcher's grid comes from them.
    num_warps: a block is 32 * num_warps threads.
    shared: bytes of dynamic shared memory.
    """

    variant: Variant
    capability: int
    function: str
    image: bytes
    parameters: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int], ...]
    num_warps: int
    shared: int
    usage: Usage


@dataclass(frozen=True, slots=True)
class CubinLibrary:
    """Every kernel of a set of engines, for every compute capability they list.

    Raises:
        BuildError: a variant lacks a cubin for one of the capabilities, or one is there twice.
    """

    capabilities: tuple[int, ...]
    cubins: tuple[Cubin, ...]

    def __post_init__(self) -> None:
        present = [(cubin.variant, cubin.capability) for cubin in self.cubins]
        if len(set(present)) != len(present):
            raise BuildError("a kernel is in the library twice: compile each variant once")
        for variant in self.variants:
            missing = [c for c in self.capabilities if (variant, c) not in present]
            if missing:
                raise BuildError(f"{variant} is not compiled for compute capability {missing}: compile it for all")

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The distinct variants, in order of first appearance."""
        return tuple(dict.fromkeys(cubin.variant for cubin in self.cubins))

    def require(self, capabilities: Sequence[int], variants: Iterable[Variant] = ()) -> None:
        """Check that a plan for `capabilities` whose nodes ask for `variants` will find all its kernels.

        Raises:
            BuildError: naming the capability or the variant that is not there.
        """
        missing = [c for c in capabilities if c not in self.capabilities]
        if missing:
            raise BuildError(f"no kernels for compute capability {missing}; the library has {list(self.capabilities)}")
        for variant in variants:
            if variant not in self.variants:
                raise BuildError(f"{variant} is not in the kernel library: compile it before building")

    def find(self, variant: Variant, capability: int) -> Cubin:
        """The cubin of `variant` for exactly this capability.

        Raises:
            BuildError: it is not there; the message names what is.
        """
        self.require([capability], [variant])
        return next(c for c in self.cubins if (c.variant, c.capability) == (variant, capability))

    def to_bytes(self) -> bytes:
        """For a file of the bundle; the same library gives the same bytes."""
        return msgspec.msgpack.encode((_SCHEMA, self))

    @classmethod
    def from_bytes(cls, data: bytes) -> "CubinLibrary":
        """Read what `to_bytes` wrote.

        Raises:
            BundleError: the bytes are no kernel library, are damaged, or of another schema.
        """
        try:
            schema, library = msgspec.msgpack.decode(data, type=tuple[int, msgspec.Raw])
            if schema != _SCHEMA:
                raise BundleError(f"kernel library of schema {schema}; this version reads {_SCHEMA}: build it again")
            return msgspec.msgpack.decode(library, type=cls)
        except (msgspec.MsgspecError, BuildError) as error:
            raise BundleError(f"the kernel library is damaged: {error}") from error
