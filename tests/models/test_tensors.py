"""Other people's tensor files: what types become, and one clear line for what can't be read."""

from __future__ import annotations

import json
import math
import struct
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from flame_jax.models.tensors import TensorError, read_tensors


def line(path: Path) -> str:
    with pytest.raises(TensorError) as caught:
        read_tensors(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def write_raw_safetensors(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """The format by hand: header length, JSON header, bytes; name -> (type, shape, bytes)."""
    header: dict[str, Any] = {}
    body = b""
    for name, (kind, shape, data) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def test_bfloat16_becomes_float32_exactly(tmp_path: Path) -> None:
    """A bfloat16 is the upper half of a float32."""
    halves = np.array([0x3F80, 0xC049, 0x0001, 0x7F80, 0x8000], np.uint16)
    write_raw_safetensors(tmp_path / "a.safetensors", {"x": ("BF16", [5], halves.tobytes())})
    found = read_tensors(tmp_path / "a.safetensors")["x"]
    assert found.dtype == np.float32
    assert found.view(np.uint32).tolist() == [int(h) << 16 for h in halves]


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_types_that_numpy_has(ending: str, tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray] = {
        "layers/w": np.array([[1, 2, 3], [4, 5, 6]], np.float32),
        "half": np.array([0.1, 6e-8, np.inf], np.float16),
        "double": np.array([math.pi, 1e300, -1e300, 1e-300], np.float64),
        "ids": np.array([2**62 + 1, 5], np.int64),
        "flags": np.array([True, False]),
        "scalar": np.array(7, np.int32),
        "none": np.zeros((0, 3), np.float32),
    }
    path = tmp_path / f"a.{ending}"
    if ending == "npz":
        np.savez(path, **tensors)  # type: ignore[arg-type]
    else:
        safetensors.numpy.save_file(tensors, path)
    found = read_tensors(str(path))
    assert found.keys() == tensors.keys()
    for name in ("layers/w", "ids", "flags", "scalar", "none"):
        assert (found[name].dtype, found[name].shape) == (tensors[name].dtype, tensors[name].shape)
        assert found[name].tolist() == tensors[name].tolist()
    assert found["half"].dtype == found["double"].dtype == np.float32
    assert found["half"].tolist() == [struct.unpack("<e", struct.pack("<e", v))[0] for v in (0.1, 6e-8, math.inf)]
    assert found["double"].tolist() == [struct.unpack("<f", struct.pack("<f", math.pi))[0], math.inf, -math.inf, 0]


def test_float32_keeps_every_bit(tmp_path: Path) -> None:
    bits = np.array([0x7FC00123, 0xFF800001, 0x80000000, 0x00000001], np.uint32)
    np.savez(tmp_path / "a.npz", x=bits.view(np.float32))
    assert read_tensors(tmp_path / "a.npz")["x"].view(np.uint32).tolist() == bits.tolist()


def test_the_other_byte_order_is_turned(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([1.5, -2], ">f4"), ids=np.array([7], ">i8"))
    found = read_tensors(tmp_path / "a.npz")
    assert [found["x"].dtype, found["ids"].dtype] == [np.dtype("<f4"), np.dtype("<i8")]
    assert found["x"].tolist() == [1.5, -2]
    assert found["ids"].tolist() == [7]


def test_pickled_arrays_are_refused_and_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    np.savez(tmp_path / "a.npz", x=np.array([Trap()], object))
    assert "pickle" in line(tmp_path / "a.npz")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("value", [np.array(["a"]), np.array([1j]), np.array(["2020"], "M8[D]")], ids=str)
def test_what_no_weight_is_made_of_is_refused_by_name(value: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", good=np.ones(2, np.float32), strange=value)
    assert "strange" in line(tmp_path / "a.npz")


def test_a_type_that_numpy_lacks_is_refused(tmp_path: Path) -> None:
    write_raw_safetensors(tmp_path / "a.safetensors", {"x": ("F8_E4M3", [2], b"\x00\x01")})
    line(tmp_path / "a.safetensors")


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
@pytest.mark.parametrize("damage", ["empty", "junk", "short"])
def test_a_damaged_file_is_refused(ending: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    np.savez(tmp_path / "a.npz", x=np.ones(100, np.float32))
    safetensors.numpy.save_file({"x": np.ones(100, np.float32)}, tmp_path / "a.safetensors")
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "junk": b"\xff" * 300, "short": whole[: len(whole) // 2]}[damage])
    assert "can't be read" in line(path)


def test_a_single_npy_is_no_npz(tmp_path: Path) -> None:
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, np.ones(3))
    line(tmp_path / "a.npz")


def test_a_missing_file_an_unknown_ending_and_a_folder(tmp_path: Path) -> None:
    assert "no file" in line(tmp_path / "gone.npz")
    (tmp_path / "weights.h5").write_bytes(b"x")
    assert ".safetensors, .npz, .pt" in line(tmp_path / "weights.h5")
    (tmp_path / "sharded.pt").mkdir()
    assert "sharded" in line(tmp_path / "sharded.pt")


def test_without_torch_a_torch_file_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.pt").write_bytes(b"x")
    said = line(tmp_path / "a.pt")
    assert "torch is not installed" in said
    assert ".safetensors" in said


@pytest.mark.parametrize("ending", ["pt", "pth", "bin"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model"])
def test_a_torch_state_dict(ending: str, wrapper: str | None, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    state = OrderedDict(
        {
            "a.weight": torch.nn.Parameter(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).T),
            "half": torch.tensor([1.5, -0.1], dtype=torch.bfloat16),
            "double": torch.tensor([1e300, 0.1], dtype=torch.float64),
            "vocabulary": torch.tensor([2**60, 3]),
            "scalar": torch.tensor(2.5),
        }
    )
    torch.save(state if wrapper is None else {wrapper: state}, tmp_path / f"a.{ending}")
    found = read_tensors(tmp_path / f"a.{ending}")
    assert found.keys() == state.keys()
    assert found["a.weight"].tolist() == [[1, 4], [2, 5], [3, 6]]
    assert found["half"].tolist() == [1.5, -0.10009765625]
    assert found["double"].tolist() == [math.inf, struct.unpack("<f", struct.pack("<f", 0.1))[0]]
    assert {n: str(t.dtype) for n, t in found.items()} == dict.fromkeys(state, "float32") | {"vocabulary": "int64"}
    assert found["vocabulary"].tolist() == [2**60, 3]
    assert found["scalar"].shape == ()


@pytest.mark.filterwarnings("ignore:.*sparse")
def test_torch_entries_that_are_no_tensors_are_named(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.ones(2), "epoch": 3, "nested": {"w": torch.ones(2)}}, tmp_path / "a.pt")
    assert "epoch, nested" in line(tmp_path / "a.pt")
    torch.save(torch.ones(2), tmp_path / "a.pt")
    assert "Tensor" in line(tmp_path / "a.pt")
    torch.save({"w": torch.ones(2), "s": torch.eye(3).to_sparse()}, tmp_path / "a.pt")
    assert ": s " in line(tmp_path / "a.pt")


def test_torch_objects_are_refused_and_not_run(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"w": Trap()}, tmp_path / "a.pt")
    assert "weights_only" in line(tmp_path / "a.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("data", [b"", b"junk" * 50])
def test_a_damaged_torch_file_is_refused(data: bytes, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "a.pt").write_bytes(data)
    assert "can't be read" in line(tmp_path / "a.pt")
