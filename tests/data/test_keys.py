"""Stable keys of strings, against the hash's definition."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame_jax.data import keys
from flame_jax.data.errors import DataError
from flame_jax.data.keys import stable_key, stable_keys


def by_definition(text: str) -> int:
    head, *tail = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    value = head % 128
    for byte in tail:
        value = value * 256 + byte
    return value


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("", 7252660547403494068),
        ("a", 4681665781835383343),
        ("B07XJ8C8F5", 8814794834425783313),
        ("☃", 394140612392306275),
    ],
)
def test_a_key_never_changes(text: str, key: int) -> None:
    assert stable_key(text) == key == by_definition(text)


@given(st.text())
def test_a_key_is_the_hash_without_its_top_bit(text: str) -> None:
    assert stable_key(text) == by_definition(text)
    assert 0 <= stable_key(text) < 2**63


def test_keys_of_many_are_the_keys_of_each() -> None:
    texts = [f"item {i}" for i in range(1000)]
    found = stable_keys(texts)
    assert found.dtype == np.int64
    assert found.tolist() == [by_definition(text) for text in texts]
    assert stable_keys([]).tolist() == []


def test_two_strings_of_one_key_are_refused_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "stable_key", len)
    assert stable_keys(["a", "bb", "ccc"]).tolist() == [1, 2, 3]
    with pytest.raises(DataError, match="item id 'bb' and 'dd' hash to one key"):
        stable_keys(["dd", "a", "bb", "ccc"], "item id")
