"""Executables as bytes, what may be unpickled, and the counter of compilations."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import resource
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax._src.interpreters.pxla import UnloadedMeshExecutable

from flame_jax.fke.compile import CompileCounter, compiled_anew, deserialize, output_memory, serialize
from flame_jax.fke.device import platform_of
from flame_jax.fke.manifest import portable_name
from flame_jax.packing import Bucket, Extent
from tests import tiny

BUCKET = tiny.BUCKETS[0]
WEIGHTS = len(tiny.random_weights(0))
REFUSED = (pickle.UnpicklingError, ValueError, jax.errors.JaxRuntimeError)
"""What Engine turns into an ArtifactError."""


class Reduced:
    """Unpickles as the result of a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._call


class Persistent:
    """Pickled as a persistent id."""

    def __init__(self, identity: Any) -> None:
        self.identity = identity

    def __repr__(self) -> str:
        return f"Persistent{self.identity}"


class Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.identity if isinstance(obj, Persistent) else None


def pickled(value: Any) -> bytes:
    file = io.BytesIO()
    Pickler(file).dump(value)
    return file.getvalue()


def load(payload: bytes) -> jax.stages.Compiled:
    return deserialize(payload, WEIGHTS, tiny.device())


@pytest.mark.parametrize("bucket", tiny.BUCKETS, ids=str)
def test_a_loaded_executable_gives_the_same_bits(bucket: Bucket) -> None:
    weights = list(tiny.random_weights(3).values())
    words, _ = tiny.packed_slot(bucket, [Extent(7, 5), Extent(0, 3)])
    before = np.asarray(tiny.compiled(bucket)(weights, words))
    loaded = load(tiny.executables()[bucket])
    after = np.asarray(loaded(weights, words))
    assert after.shape == (bucket.candidates, len(tiny.SCHEMA.tasks))
    assert after.tobytes() == before.tobytes()
    assert np.ptp(after[-5:]) > 0


def test_where_an_executable_leaves_its_scores_is_known_even_if_it_was_compiled_elsewhere() -> None:
    weights, words = [np.full(3, 2, np.float32)], np.arange(6, dtype=np.int32)

    def rank(weights: list[jax.Array], words: jax.Array) -> Any:
        return jax.device_put(words[:3] * weights[0], jax.memory.Space.Host)

    with compiled_anew():
        compiled: Any = jax.jit(rank).lower(weights, words).compile()
    here = jax.sharding.SingleDeviceSharding(tiny.device())
    compiled._executable._unloaded_executable.output_shardings = [here]  # as it is for a device that is described
    loaded = deserialize(serialize(compiled), 1, tiny.device())
    assert output_memory(loaded) == "pinned_host"
    scores = loaded(weights, words)
    assert scores.sharding.memory_kind == "pinned_host"
    assert np.asarray(scores).tolist() == [0, 2, 4]
    assert output_memory(load(tiny.executables()[BUCKET])) == "device"


def test_loading_twice_gives_two_executables_that_agree() -> None:
    weights = list(tiny.random_weights(3).values())
    words, _ = tiny.packed_slot(BUCKET, [Extent(7, 5)])
    one, two = (np.asarray(load(tiny.executables()[BUCKET])(weights, words)) for _ in range(2))
    assert one.tobytes() == two.tobytes()


def test_a_loaded_executable_refuses_a_slot_of_another_bucket() -> None:
    words, _ = tiny.packed_slot(tiny.BUCKETS[1], [Extent(7, 5)])
    with pytest.raises((TypeError, ValueError)):
        load(tiny.executables()[BUCKET])(list(tiny.random_weights(3).values()), words)


CALLS: list[tuple[str, tuple[Any, ...]]] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event in {"os.system", "subprocess.Popen", "exec"} and any("touch" in str(a) for a in arguments):
        CALLS.append((event, arguments))


@pytest.fixture(scope="module")
def _audited() -> None:
    sys.addaudithook(_watch)


@pytest.mark.usefixtures("_audited")
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("place", ["alone", "among the arguments", "in place of the executable"])
def test_a_pickle_that_runs_a_command_is_refused_without_running_it(place: str, protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    evil = Reduced(os.system, f"touch {marker}")
    value = {"alone": evil, "among the arguments": (1, [evil], True), "in place of the executable": (evil, [], True)}
    with pytest.raises(pickle.UnpicklingError, match=r"may not name (posix|nt|os)\.system"):
        load(pickle.dumps(value[place], protocol))
    assert not marker.exists()
    assert CALLS == []


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("os", "system"),
        ("jax", "numpy.save"),
        ("jax._src.core", "os.system"),
        ("jax.experimental.serialize_executable", "deserialize_and_load"),
        ("jaxlib._jax", "Client"),
        ("numpy", "load"),
        ("numpy", "dtype.__reduce__"),
        ("flame_jax.fke.compile", "deserialize"),
    ],
)
def test_only_the_classes_of_an_executable_may_be_named(module: str, name: str) -> None:
    strings = b"".join(b"\x8c" + bytes([len(s)]) + s.encode() for s in (module, name))
    payload = b"\x80\x04" + strings + b"\x93."  # protocol 4: two strings, STACK_GLOBAL
    with pytest.raises(pickle.UnpicklingError, match=f"may not name {module}.{name}"):
        load(payload)


@pytest.mark.parametrize("state", [{"load": None}, (None, {"load": None})], ids=["dict", "slots"])
def test_a_class_that_may_be_named_may_not_be_changed(state: Any) -> None:
    """A refused file must not leave a broken JAX behind, in a process that goes on serving."""
    before = UnloadedMeshExecutable.load
    named = pickle.dumps(UnloadedMeshExecutable, 4)[:-1]  # without STOP
    payload = named + pickle.dumps(state, 4)[2:-1] + pickle.BUILD + pickle.STOP
    with pytest.raises(pickle.UnpicklingError, match="may not change a class"):
        load(payload)
    assert UnloadedMeshExecutable.load is before


def test_a_few_bytes_do_not_take_gigabytes() -> None:
    payload = pickle.NONE + pickle.LONG_BINPUT + (2**31 - 1).to_bytes(4, "little") + pickle.STOP
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(REFUSED):
        load(payload)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize("kept", [0, 1, 2, 50, 0.3, 0.9, -1])
def test_a_truncated_executable_is_refused(kept: float) -> None:
    payload = tiny.executables()[BUCKET]
    size = int(kept * len(payload)) if 0 < kept < 1 else int(kept)
    with pytest.raises(REFUSED):
        load(payload[:size])


@pytest.mark.parametrize(
    "value",
    [
        1,
        None,
        (),
        (1, 2),
        (1, 2, 3),
        (b"native code", [], True),
        (Persistent(("client",)), [], True),
        (Persistent(("device", 10**6)), [], True),
        (Persistent(("exec", b"junk")), [], True),
        (Persistent(("exec",)), [], True),
        (Persistent(5), [], True),
        (Persistent(("file", "/etc/passwd")), [], True),
    ],
    ids=repr,
)
def test_a_pickle_of_something_else_is_refused(value: Any) -> None:
    with pytest.raises(REFUSED):
        load(pickled(value))


def test_a_bit_flipped_around_the_native_code_is_refused_or_harmless() -> None:
    payload = tiny.executables()[BUCKET]
    blob = max((arg for _, arg, _ in pickletools.genops(payload) if isinstance(arg, bytes)), key=len)
    tail = payload.index(blob) + len(blob)
    words, _ = tiny.packed_slot(BUCKET, [Extent(7, 5)])
    weights = list(tiny.random_weights(3).values())
    right = np.asarray(tiny.compiled(BUCKET)(weights, words))
    random = np.random.default_rng(1)
    refused = 0
    for position in random.integers(tail, len(payload), 30).tolist():
        damaged = bytearray(payload)
        damaged[position] ^= 1 << int(random.integers(8))
        try:
            loaded = load(bytes(damaged))
        except REFUSED:
            refused += 1
            continue
        try:
            scores = np.asarray(loaded(weights, words))
        except Exception:  # its description of the arguments was hit: it loads, and refuses to run
            refused += 1
            continue
        np.testing.assert_array_equal(scores, right)
    assert refused


@pytest.mark.parametrize("weights", [0, WEIGHTS - 1, WEIGHTS + 1])
def test_an_executable_for_another_number_of_weights_is_refused(weights: int) -> None:
    with pytest.raises(REFUSED):
        deserialize(tiny.executables()[BUCKET], weights, tiny.device())


def test_a_portable_program_tells_no_path_of_the_machine_that_made_it() -> None:
    for bucket in tiny.BUCKETS:
        program = tiny.built()[1][portable_name(bucket)]
        assert b".py" not in program
        assert str(Path.cwd()).encode() not in program


def test_the_counter_counts_a_new_compilation_and_nothing_else() -> None:
    loaded = load(tiny.executables()[BUCKET])
    weights = list(tiny.random_weights(3).values())
    words, _ = tiny.packed_slot(BUCKET, [Extent(7, 5)])
    three = jax.device_put(np.arange(3, dtype=np.float32))
    four = jax.device_put(np.arange(4, dtype=np.float32))
    counter, earlier = CompileCounter(), CompileCounter()

    @jax.jit
    def twice(x: jax.Array) -> jax.Array:
        return x * 2

    twice(three).block_until_ready()
    assert counter.count == 1
    twice(three).block_until_ready()
    assert counter.count == 1
    twice(four).block_until_ready()
    assert counter.count == 2
    loaded(weights, words).block_until_ready()
    load(tiny.executables()[BUCKET])(weights, words).block_until_ready()
    assert counter.count == 2
    assert earlier.count == 2
    assert CompileCounter().count == 0


def test_what_is_compiled_anew_is_not_from_the_cache(request: pytest.FixtureRequest) -> None:
    least = "jax_persistent_cache_min_compile_time_secs"
    request.addfinalizer(partial(jax.config.update, least, getattr(jax.config, least)))
    jax.config.update(least, 0.0)  # type: ignore[no-untyped-call]
    hits: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)

    def compiled() -> None:
        jax.jit(lambda x: x @ x.T + 4321.0).lower(np.ones((3, 5), np.float32)).compile()  # in no other test

    compiled()
    hits.clear()
    with compiled_anew():
        compiled()
    assert not hits
    compiled()
    assert hits


@pytest.mark.parametrize(("version", "name"), [("PJRT C API\ncuda 13000", "cuda"), ("PJRT C API\nROCM 6.2", "rocm")])
def test_a_gpu_is_named_by_its_make(version: str, name: str) -> None:
    gpu: Any = SimpleNamespace(platform="gpu", client=SimpleNamespace(platform_version=version))
    assert platform_of(gpu) == name


def test_a_cpu_is_named_as_jax_names_it() -> None:
    assert platform_of(jax.devices("cpu")[0]) == "cpu"
