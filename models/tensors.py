"""Named tensors from other people's files: safetensors, NumPy's .npz, torch's .pt."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""The one key of a torch file under which a state dict may lie."""


class TensorError(Exception):
    """The file can't be read; the message is one clear line for the operator."""


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Read every tensor of one file, by its ending: `.safetensors`, `.npz`, or `.pt`, `.pth`, `.bin` (torch's).

    bfloat16 and float16 become float32, which is exact; float64 is rounded to float32, and a value beyond its range
    becomes infinite. Integers and booleans stay as they are. A torch file may hold the tensors one level down, under
    a single key `state_dict`, `model_state_dict` or `model`; nothing in it is unpickled but tensors.

    Returns:
        Name -> float32, integer or boolean array in host memory, native byte order.

    Raises:
        TensorError: no such file, a folder, an unknown ending, a damaged file, pickled objects, entries that are no
            tensors, a torch file where torch is not installed.
    """
    path = Path(path)
    if path.is_dir():
        raise TensorError(
            f"{path} is a folder: sharded and distributed checkpoints are not read, gather the tensors into one file"
        )
    if not path.is_file():
        raise TensorError(f"there is no file {path}")
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise TensorError(f"{path} has an unknown ending: tensors are read from {', '.join(READERS)}")
    return {name: _plain(value, name, path) for name, value in read(path).items()}


def first_line(error: BaseException) -> str:
    """What an exception says, cut to one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _plain(value: np.ndarray, name: str, path: Path) -> np.ndarray:
    kind = value.dtype.kind
    if kind == "f" or value.dtype == ml_dtypes.bfloat16:
        # A float32 must not be touched: NaN payloads would survive a cast only by luck.
        if value.dtype == np.float32:
            return value
        with np.errstate(over="ignore", invalid="ignore"):
            return value.astype(np.float32)
    if kind not in "iub":
        raise TensorError(f"{path}: {name} is {value.dtype}, which no weight is stored as")
    return value.astype(value.dtype.newbyteorder("="), copy=False)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    # AttributeError and TypeError: a type that NumPy lacks (float8).
    except (safetensors.SafetensorError, AttributeError, TypeError, ValueError, OSError) as error:
        raise TensorError(f"{path} can't be read as safetensors: {first_line(error)}") from error


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        # NumPy leaves a file that it opened itself open when it is no archive.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # NumPy and zipfile raise half a dozen kinds on damaged bytes
        raise TensorError(f"{path} can't be read as .npz without pickle: {first_line(error)}") from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        raise TensorError(
            f"{path} is a torch file and torch is not installed: install it, or save the tensors as .safetensors or "
            f".npz where it is"
        ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's, zipfile's and torch's own, by the kind of damage
        raise TensorError(
            f"{path} can't be read by torch with weights_only, save a state dict of plain tensors: {first_line(error)}"
        ) from error
    if isinstance(state, dict) and len(state) == 1:
        (key, inner), *_ = state.items()
        if key in WRAPPERS and isinstance(inner, dict):
            state = inner
    if not isinstance(state, dict):
        raise TensorError(f"{path} holds a {type(state).__name__}, not a dict of tensors")
    if strange := [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise TensorError(f"{path} has entries that are no tensors: {', '.join(strange)}")
    return {str(name): _from_torch(torch, value, str(name), path) for name, value in state.items()}


def _from_torch(torch: Any, tensor: Any, name: str, path: Path) -> np.ndarray:
    try:
        tensor = tensor.detach()
        # NumPy has no bfloat16 and torch has several floats besides: it casts them itself.
        if tensor.is_floating_point():
            tensor = tensor.to(torch.float32)
        array: np.ndarray = tensor.numpy()
        return array
    except (TypeError, RuntimeError) as error:  # sparse and quantised tensors
        raise TensorError(f"{path}: {name} is no plain tensor: {first_line(error)}") from error


READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".bin": _read_torch,
}
