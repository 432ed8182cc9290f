"""What executables take: lines by hand, and a measure against buckets that are compiled apart from it."""

from __future__ import annotations

import dataclasses

import pytest

from flame_jax.fke.compile import serialize
from flame_jax.fke.footprint import Line, measure
from flame_jax.packing import Bucket
from tests import tiny


def test_a_line_through_points_that_lie_on_one() -> None:
    line = Line.through([10, 20, 40], [25, 45, 85])
    assert line == pytest.approx((5, 2))
    assert line.at(Bucket(30, 10)) == pytest.approx(65)


@pytest.mark.parametrize(
    ("rows", "values", "constant"), [([10, 20], [7, 3], 5), ([10], [4], 4), ([10, 10], [4, 6], 5)], ids=str
)
def test_values_that_fall_or_one_size_alone_give_their_mean(
    rows: list[int], values: list[float], constant: float
) -> None:
    assert Line.through(rows, values) == (constant, 0)


def test_a_line_is_never_negative() -> None:
    assert Line(-100, 1).at(Bucket(8, 8)) == 0


def test_the_measure_is_what_the_compiled_buckets_say() -> None:
    smallest, largest = tiny.BUCKETS
    measured = measure(
        tiny.MODEL,
        tiny.SCHEMA,
        tiny.LAYOUT,
        [largest, smallest, largest],
        tiny.ITEMS + 1,
        precision="highest",
        device=tiny.device(),
    )
    assert measured.buckets == (smallest, largest)
    assert measured.device_kind == tiny.device().device_kind
    for bucket in tiny.BUCKETS:
        compiled = tiny.compiled(bucket)
        memory = compiled.memory_analysis()
        assert memory is not None
        assert measured.temporaries.at(bucket) == pytest.approx(memory.temp_size_in_bytes)
        assert measured.code.at(bucket) == pytest.approx(len(serialize(compiled)), rel=0.05)
    assert measured.seconds.at(largest) > 0.05


def test_a_bucket_between_takes_about_what_the_line_says() -> None:
    schema = dataclasses.replace(tiny.SCHEMA, block_length=32)
    ends, between = [Bucket(64, 32), Bucket(1024, 512)], Bucket(544, 272)

    def temporaries(buckets: list[Bucket]) -> Line:
        return measure(
            tiny.MODEL, schema, tiny.LAYOUT, buckets, 41, precision="highest", device=tiny.device()
        ).temporaries

    assert temporaries(ends).at(between) == pytest.approx(temporaries([between]).constant, rel=0.15)
