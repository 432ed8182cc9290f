"""Ahead-of-time compilation of a model for one bucket, and the counter that proves nothing compiles later."""

from __future__ import annotations

import importlib
import io
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, ClassVar

import jax
import jax.export
import numpy as np
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jaxlib import xla_client

from flame_jax.config import ModelConfig
from flame_jax.fke.device import platform_of
from flame_jax.models.serving import rank_function, served_slot, served_specs
from flame_jax.packing import Bucket, Layout
from flame_jax.pallas_kernels.kernels import REFERENCE, Kernels
from flame_jax.schema import FeatureSchema

PLATFORMS = ("cpu", "cuda")
"""What portable programs without fused kernels are made for."""
FUSED_PLATFORMS = ("cuda",)
"""What those with them are made for."""

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

# What a serialised executable of ours is made of besides the native code, which comes as a persistent id.
_ALLOWED = frozenset(
    {
        ("jax", "P"),
        ("jax._src.core", "ManualAxisType"),
        ("jax._src.core", "MemorySpace"),
        ("jax._src.core", "ShapedArray"),
        ("jax._src.interpreters.pxla", "AllArgsInfo"),
        ("jax._src.interpreters.pxla", "UnloadedMeshExecutable"),
        ("jax._src.layout", "AutoLayoutSingleton"),
        ("jax._src.layout", "Layout"),
        ("jax._src.linear_util", "DebugInfo"),
        ("jax._src.mesh", "AbstractMesh"),
        ("jax._src.named_sharding", "_unpickle_named_sharding"),
        ("jax._src.sharding_impls", "_unpickle_single_device_sharding"),
        ("jax._src.stages", "ArgInfo"),
        ("jaxlib._jax", "DeviceList"),
        ("ml_dtypes", "bfloat16"),
        ("numpy", "dtype"),
    }
)


class CompileCounter:
    """Counts XLA compilations in this process from the moment it is made."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILE_EVENT:
            self.count += 1


def portable_program(
    model: ModelConfig,
    schema: FeatureSchema,
    layout: Layout,
    bucket: Bucket,
    vocabulary: int,
    *,
    precision: str,
    kernels: Kernels = REFERENCE,
) -> bytes:
    """`rank(weights, slot)` of one bucket as StableHLO, which this JAX and later ones can compile for `platforms`.

    For how much later is jax.export's promise (half a year, when this was written).
    """
    slot = served_slot(model, schema, layout, bucket)
    weights = [
        jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in served_specs(model, schema, vocabulary).values()
    ]
    words = jax.ShapeDtypeStruct((slot.words,), np.int32)
    function = rank_function(model, schema, layout, slot, vocabulary, kernels)
    with jax.default_matmul_precision(precision), _no_locations():
        exported = jax.export.export(jax.jit(function), platforms=platforms(kernels))(weights, words)
    return bytes(exported.serialize())


def platforms(kernels: Kernels) -> tuple[str, ...]:
    """What programs with these kernels can be compiled for."""
    return PLATFORMS if kernels == REFERENCE else FUSED_PLATFORMS


@contextmanager
def compiled_anew() -> Iterator[None]:
    """Inside, this process uses no compilation cache: on the CPU what comes from one can't be serialised again (it
    loses its functions), and XLA tells nothing of how it tuned it."""
    name = "jax_enable_compilation_cache"
    before = getattr(jax.config, name)
    jax.config.update(name, False)
    reset_cache()  # it looks at the setting once
    try:
        yield
    finally:
        jax.config.update(name, before)
        reset_cache()


def load_kernel_runtime() -> None:
    """Let XLA find what Mosaic GPU kernels call on the host; before such a program is compiled or loaded."""
    importlib.import_module("jax.experimental.mosaic.gpu")  # it tells where the library is


@contextmanager
def _no_locations() -> Iterator[None]:
    """Inside, programs are made without the paths of this machine's source files."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def lower_program(program: bytes, device: jax.Device) -> jax.stages.Lowered:
    """Prepare a portable program for one device; `.compile()` of it may run in another thread.

    Raises:
        ValueError: the program is damaged, or is not for this platform.
    """
    try:
        exported = jax.export.deserialize(bytearray(program))
    except Exception as error:  # damaged bytes raise nearly anything
        raise ValueError(f"damaged program: {type(error).__name__}") from error
    if platform_of(device) not in exported.platforms:
        raise ValueError(f"a program for {', '.join(exported.platforms)} can't be compiled for {platform_of(device)}")
    if exported.platforms == FUSED_PLATFORMS:
        load_kernel_runtime()
    sharding = jax.sharding.SingleDeviceSharding(device)
    specs = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in exported.in_avals]

    def to_host(weights: Sequence[jax.Array], words: jax.Array) -> jax.Array:
        scores: jax.Array = jax.device_put(exported.call(weights, words), jax.memory.Space.Host)
        return scores

    # Scores that the program itself leaves in page-locked memory need no copy of their own, which takes 200 us.
    rank = to_host if platform_of(device) == "cuda" else exported.call
    try:
        return jax.jit(rank).lower(specs[:-1], specs[-1])
    except Exception as error:  # likewise
        raise ValueError(f"damaged program: {type(error).__name__}") from error


def serialize(compiled: jax.stages.Compiled) -> bytes:
    """An executable as bytes, for `deserialize`."""
    payload: bytes = serialize_executable.serialize(compiled)[0]
    return payload


def output_memory(compiled: jax.stages.Compiled) -> str:
    """The kind of memory that an executable with one output leaves it in."""
    return str(compiled.output_shardings.memory_kind or "device")


def deserialize(payload: bytes, weights: int, device: jax.Device) -> jax.stages.Compiled:
    """Load an executable made by `serialize`.

    Args:
        payload: bytes whose origin is trusted: executables are native code. The pickle around it may name
            only the classes that one of ours is made of.
        weights: length of the flat list.
        device: where it is to run, of any client; it was built on device 0 of the process that made it.

    Raises:
        pickle.UnpicklingError: the payload names any other class, or is damaged.
        jax.errors.JaxRuntimeError: XLA does not take the native code.
    """
    try:
        unpickler = _Unpickler(io.BytesIO(payload), device)
        unloaded, info, no_kwargs = unpickler.load()
        arguments = jax.tree.unflatten(jax.tree.structure((([0] * weights, 0), {})), info)
        # Compiled for a device that was not there, it has no word of the memory that its output is in.
        ((kind,),) = unloaded.xla_executable.get_output_memory_kinds()
        unloaded.output_shardings = [jax.sharding.SingleDeviceSharding(device, memory_kind=kind)]
        return jax.stages.Compiled(unloaded.load(), [], arguments, jax.tree.structure(0), no_kwargs=no_kwargs)
    except (pickle.UnpicklingError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise pickle.UnpicklingError(f"damaged executable: {type(error).__name__}") from error


def _assigned_to(device: jax.Device) -> Any:
    """Options that move an executable from device 0 to another one, as JAX's compilation cache does."""
    if device.id == 0:
        return None
    options = xla_client.CompileOptions()
    options.device_assignment = xla_client.DeviceAssignment.create(np.array([[device.id]]))
    return options


def _build(unpickler: Any) -> None:
    """The opcode that gives an object its state."""
    # A class or function may be named by what was allowed, and would be changed for the whole process.
    if isinstance(unpickler.stack[-2], (type, FunctionType, BuiltinFunctionType, MethodType)):
        raise pickle.UnpicklingError("an executable may not change a class")
    pickle._Unpickler.load_build(unpickler)  # type: ignore[attr-defined]


class _Unpickler(pickle._Unpickler):
    """In Python, because the C one's opcodes can't be overridden; around the native code there is little to read."""

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: _build}

    def __init__(self, file: io.BytesIO, device: jax.Device) -> None:
        super().__init__(file)
        self._device = device

    def persistent_load(self, pid: Any) -> Any:
        """The three kinds of things that `serialize_executable` leaves out of the pickle."""
        match pid:
            case ("exec", bytes(native)):
                devices, options = xla_client.DeviceList((self._device,)), _assigned_to(self._device)
                return self._device.client.deserialize_executable(native, devices, options)
            case ("device", int()):
                return self._device
            case ("client",):
                return self._device.client
        raise pickle.UnpicklingError("an executable may not refer to anything but native code and its device")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"an executable may not name {module}.{name}")
        return super().find_class(module, name)
