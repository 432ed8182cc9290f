"""The vocabulary as a dict of 64-bit ids, and the bytes it refuses."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flame_jax.vocabulary import UNKNOWN_ROW, Vocabulary

# Ids that collide when cut to 32 bits or rounded to a double.
_BASES = (0, 2**31 - 3, 2**32, 2**33, 2**53, 2**62)
IDS = st.one_of(
    st.builds(lambda base, low: base + low, st.sampled_from(_BASES), st.integers(0, 6)),
    st.integers(2**63 - 6, 2**63 - 1),
)
VOCABULARIES = st.lists(IDS, max_size=20, unique=True)
QUERIES = st.lists(st.one_of(IDS, st.integers(-(2**63), 2**63 - 1)), max_size=20)


def int64(ids: list[int]) -> np.ndarray:
    return np.array(ids, np.int64)


def npy(array: np.ndarray, *, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, keys=int64([1, 2]))
    return buffer.getvalue()


@pytest.fixture(params=["searched", "indexed"])
def every_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small vocabularies are looked up in as large ones are, too."""
    if request.param == "indexed":
        monkeypatch.setattr("flame_jax.vocabulary.SEARCHED", 0)


@pytest.mark.usefixtures("every_size")
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(VOCABULARIES, QUERIES)
def test_lookup_agrees_with_a_dict_of_the_sorted_ids(ids: list[int], queries: list[int]) -> None:
    rows = {key: row for row, key in enumerate(sorted(ids), start=1)}
    vocabulary = Vocabulary(int64(ids))
    found = vocabulary.lookup(int64(queries + ids))
    assert found.dtype == np.int32
    assert found.tolist() == [rows.get(query, UNKNOWN_ROW) for query in queries + ids]
    assert vocabulary.lookup(int64(queries + ids)[None]).tolist() == [found.tolist()]
    assert vocabulary.rows == len(ids) + 1


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("spread", [1, 2, 2**16, 2**43])
def test_keys_in_a_row_and_keys_far_apart_are_found(spread: int) -> None:
    keys = 7 + spread * np.arange(100_000)
    vocabulary = Vocabulary(keys)
    assert (vocabulary.lookup(keys) == np.arange(1, 100_001)).all()
    assert (vocabulary.lookup(keys[-1] + 1 + np.arange(1000)) == UNKNOWN_ROW).all()
    if spread > 1:
        assert (vocabulary.lookup(keys + 1) == UNKNOWN_ROW).all()


def test_the_key_whose_product_is_the_largest_number_is_found_and_its_absence_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flame_jax.vocabulary.SEARCHED", 0)
    last = -pow(0x9E3779B97F4A7C15, -1, 2**64) % 2**64
    key = np.array([last], np.uint64).view(np.int64)
    queries = np.concatenate([key, int64([3, 9])])
    assert Vocabulary(int64([3, 9])).lookup(queries).tolist() == [UNKNOWN_ROW, 1, 2]
    if key[0] >= 0:
        assert Vocabulary(np.concatenate([key, int64([3])])).lookup(queries).tolist() == [2, 1, UNKNOWN_ROW]


def test_an_id_is_not_mistaken_for_its_low_32_bits() -> None:
    vocabulary = Vocabulary(int64([3, 2**53 + 1]))
    assert vocabulary.lookup(int64([3, 2**32 + 3, 3 - 2**32, 2**53, 2**53 + 2])).tolist() == [1, 0, 0, 0, 0]


def test_the_largest_id_is_an_id_like_any_other() -> None:
    vocabulary = Vocabulary(int64([2**63 - 1, 0]))
    assert vocabulary.lookup(int64([2**63 - 1, 2**63 - 2, 0, -1, -(2**63)])).tolist() == [2, 0, 1, 0, 0]


def test_an_empty_vocabulary_knows_nothing() -> None:
    vocabulary = Vocabulary(int64([]))
    assert vocabulary.rows == 1
    assert vocabulary.lookup(int64([0, 1, -1])).tolist() == [0, 0, 0]
    assert vocabulary.lookup(int64([])).dtype == np.int32


@pytest.mark.parametrize(
    "ids",
    [int64([1, 1]), int64([5, 3, 5]), int64([-1]), int64([0, -(2**63)]), np.zeros((2, 2), np.int64), np.array(3)],
    ids=str,
)
def test_repeated_negative_or_oddly_shaped_ids_are_refused(ids: np.ndarray) -> None:
    with pytest.raises(ValueError):
        Vocabulary(ids)


@settings(max_examples=30)
@given(VOCABULARIES)
def test_saved_bytes_bring_the_vocabulary_back(tmp_path_factory: pytest.TempPathFactory, ids: list[int]) -> None:
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.npy"
    Vocabulary(int64(ids)).save(path)
    again = Vocabulary.from_bytes(path.read_bytes())
    assert again.lookup(int64(ids)).tolist() == Vocabulary(int64(ids)).lookup(int64(ids)).tolist()
    assert again.rows == len(ids) + 1


@pytest.mark.parametrize(
    "data",
    [
        npy(np.array([1, 2], np.int32)),
        npy(np.array([1, 2], np.uint64)),
        npy(np.array([1.0, 2.0])),
        npy(np.array(["1", "2"])),
        npy(np.array([1, "x"], object), allow_pickle=True),
        npy(int64([1, 1])),
        npy(int64([-1])),
        npy(np.array(1, np.int64)),
        npy(np.zeros((1, 2), np.int64)),
        npz(),
        pickle.dumps(int64([1, 2])),
        b"",
        b"\x93NUMPY",
        b"PK\x03\x04 no archive",
        b"hello",
        npy(int64([1, 2]))[:-1],
    ],
    ids=[
        "int32",
        "uint64",
        "float",
        "text",
        "object",
        "repeated",
        "negative",
        "no_axis",
        "two_axes",
        "npz",
        "pickle",
        "nothing",
        "magic",
        "zip_magic",
        "garbage",
        "short",
    ],
)
def test_bytes_of_anything_else_are_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        Vocabulary.from_bytes(data)


@pytest.mark.filterwarnings("ignore:Reading `.npy` or `.npz` file required additional header parsing")
@settings(max_examples=100)
@given(st.integers(0, 8 * 128 - 1))
def test_a_flipped_bit_in_the_header_is_harmless_or_a_value_error(bit: int) -> None:
    data = bytearray(npy(int64([1, 2, 3])))
    data[bit // 8] ^= 1 << bit % 8
    try:
        keys = Vocabulary.from_bytes(bytes(data)).keys
    except ValueError:
        return
    assert keys.dtype == np.int64


@settings(max_examples=100)
@given(st.one_of(st.binary(max_size=200), st.integers(0, 151).map(lambda n: npy(int64([1, 2, 3]))[:n])))
def test_random_and_truncated_bytes_are_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        Vocabulary.from_bytes(data)


def test_a_file_holds_the_ids_and_nothing_that_runs(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.npy"
    Vocabulary(int64([9, 4, 2**40])).save(path)
    assert np.load(path, allow_pickle=False).tolist() == [4, 9, 2**40]


@pytest.mark.parametrize("size", [3, 100_000])
def test_ids_of_another_integer_type_are_found_too(size: int) -> None:
    keys = 3 * np.arange(1, size + 1)
    assert Vocabulary(keys).lookup(np.array([3, 4, 6], np.int32)).tolist() == [1, UNKNOWN_ROW, 2]
