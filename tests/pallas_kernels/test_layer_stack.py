"""A stack of layers against the float64 oracle, one after another and as one kernel alike."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flame_jax.packing import Bucket, Layout
from flame_jax.pallas_kernels.kernels import REFERENCE
from flame_jax.pallas_kernels.layer_stack import mosaic
from flame_jax.pallas_kernels.layer_stack.api import layer_stack
from flame_jax.pallas_kernels.post_attention.types import Projection
from flame_jax.pallas_kernels.segments import owned
from flame_jax.schema import Block, FeatureSchema
from tests.oracles import climber as oracle
from tests.packed import Packed, pack, random_request

LAYERS, BLOCKS, WIDTH, FFN, HEADS = 2, 2, 128, 256, 2
SCHEMA = FeatureSchema(scenarios=("a", "b"), blocks=(Block("x"), Block("y")), block_length=200)
LAYOUT, BUCKET = Layout(align=64, max_requests=4), Bucket(384, 192)
FIRST = BUCKET.tokens - BUCKET.candidates
MOSAIC = partial(mosaic.layer_stack, interpret=True)


def weights(random: np.random.Generator) -> dict[str, np.ndarray]:
    """By name, with the oracle's `temperature` and `bias`; matrices that bfloat16 holds exactly."""

    def matrix(rows: int, columns: int) -> np.ndarray:
        values = random.normal(size=(LAYERS, BLOCKS, rows, columns)) * rows**-0.5
        return np.asarray(jnp.asarray(values, jnp.bfloat16), np.float32)

    def vector(*size: int, mean: float = 0.0) -> np.ndarray:
        return (mean + 0.1 * random.normal(size=(LAYERS, BLOCKS, *size))).astype(np.float32)

    shapes = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH), "ffn1": (WIDTH, FFN), "ffn2": (FFN, WIDTH)}
    found = {f"{name}_w": matrix(*shape) for name, shape in shapes.items()}
    found |= {f"{name}_b": vector(columns) for name, (_, columns) in shapes.items()}
    for norm in ("norm1", "norm2"):
        found |= {f"{norm}_scale": vector(WIDTH, mean=1.0), f"{norm}_shift": vector(WIDTH)}
    return found | {"temperature": vector(2, HEADS, mean=8.0), "bias": vector(2, HEADS, 3)}


def run(implementation: str, x: np.ndarray, packed: Packed, own: dict[str, np.ndarray], **changed: Any) -> Any:
    given = {name: jnp.asarray(w) for name, w in own.items() if name not in ("temperature", "bias")}
    wide = implementation == "xla"
    function = partial(layer_stack, kernels=REFERENCE) if wide else MOSAIC
    settings: dict[str, Any] = {
        "temperature": jax.nn.softplus(jnp.asarray(own["temperature"])),
        "coefficients": jnp.asarray(own["bias"]),
        "following": Projection(given["qkv_w"][:1, :1], given["qkv_b"][:1, :1], 0),
        "first_candidate": FIRST,
        "align": LAYOUT.align,
        "window": SCHEMA.block_length,
    }
    rows, time = (jnp.asarray(packed.fields[name]) for name in ("rows", "time"))
    found = function(jnp.asarray(x, jnp.float32 if wide else jnp.bfloat16), given, rows, time, **settings | changed)
    return [np.asarray(part, np.float32) for part in found]


def some_x(random: np.random.Generator) -> np.ndarray:
    return np.asarray(jnp.asarray(random.normal(size=(BLOCKS, BUCKET.tokens, WIDTH)), jnp.bfloat16), np.float32)


@pytest.mark.parametrize(("implementation", "tolerance"), [("xla", 1e-4), ("mosaic", 0.08)])
def test_it_matches_the_oracle_whatever_an_earlier_batch_left(implementation: str, tolerance: float) -> None:
    random = np.random.default_rng(0)
    own, x = weights(random), some_x(random)
    # The second history reaches into the bucket's candidate part.
    requests = [
        random_request(SCHEMA, random, lengths=n, candidates=c, rows=9) for n, c in (([20, 50], 3), ([130, 70], 60))
    ]
    packed = pack(SCHEMA, LAYOUT, BUCKET, requests, dirt=random)
    assert packed.places[1].history_start + 130 > FIRST
    given = {f"layers/{name}": w.astype(np.float64) for name, w in own.items()}
    expected, slots = [], []
    poisoned = np.full_like(x, np.nan) if implementation == "mosaic" else x
    for request, where in zip(requests, packed.places, strict=True):
        at = slice(where.candidate_start, where.candidate_start + len(request.candidates))
        slots.append(slice(at.start - FIRST, at.stop - FIRST))
        poisoned[:, at] = x[:, at]
        for block, (items, actions, times) in enumerate(request.blocks):
            mine = slice(where.history_start, where.history_start + len(items))
            poisoned[block, mine] = x[block, mine]
            request.blocks[block] = np.arange(len(items)), np.zeros_like(actions), times
            tokens = given | {"item": x[block, mine].astype(np.float64), "action": np.zeros((1, WIDTH))}
            candidates = x[block, at].astype(np.float64)
            expected.append(oracle.run_block(tokens, request, block, candidates, heads=HEADS, head_dim=WIDTH // HEADS))
    out, *qkv = run(implementation, poisoned, packed, own)
    assert all(np.isfinite(part).all() for part in (out, *qkv))
    after = own["qkv_w"][0, 0].astype(np.float64), own["qkv_b"][0, 0]
    for number, y in enumerate(expected):
        block, slot = number % BLOCKS, slots[number // BLOCKS]
        np.testing.assert_allclose(out[block, slot], y, rtol=0, atol=tolerance)
        for mine, theirs in zip(qkv, np.split(y @ after[0] + after[1], 3, axis=-1), strict=True):
            np.testing.assert_allclose(mine[block, slot], theirs, rtol=0, atol=tolerance)


def test_a_requests_bits_do_not_depend_on_its_company() -> None:
    random = np.random.default_rng(1)
    own, x = weights(random), some_x(random)
    one, other = (random_request(SCHEMA, random, lengths=n, candidates=9, rows=9) for n in ([100, 64], [64, 5]))
    among, alone = (pack(SCHEMA, LAYOUT, BUCKET, requests) for requests in ([other, one], [one]))
    here, there = among.places[1], alone.places[0]
    moved = np.zeros_like(x)
    moved[:, there.history_start :][:, :128] = x[:, here.history_start :][:, :128]
    moved[:, there.candidate_start :][:, :64] = x[:, here.candidate_start :][:, :64]
    found, same = (run("mosaic", *given, own)[0] for given in ((x, among), (moved, alone)))
    rows = [slice(p.candidate_start - FIRST, p.candidate_start - FIRST + 9) for p in (here, there)]
    assert (found[:, rows[0]] == same[:, rows[1]]).all()
    assert found[:, rows[0]].std() > 0.1


def test_whose_rows_there_are() -> None:
    random = np.random.default_rng(2)
    requests = [
        random_request(SCHEMA, random, lengths=n, candidates=c, rows=9) for n, c in (([130, 70], 60), ([0, 20], 3))
    ]
    packed = pack(SCHEMA, LAYOUT, BUCKET, requests)
    expected = np.zeros((BLOCKS, BUCKET.tokens), bool)
    for request, where in zip(requests, packed.places, strict=True):
        expected[:, where.candidate_start :][:, : len(request.candidates)] = True
        for block, (items, *_) in enumerate(request.blocks):
            expected[block, where.history_start :][: len(items)] = True
    found = owned(jnp.asarray(packed.fields["rows"]), BUCKET.tokens, align=LAYOUT.align)
    np.testing.assert_array_equal(np.asarray(found), expected)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"dtype": jnp.float32}, "dtype float32"),
        ({"width": 64}, "width 64"),
        ({"heads": 4}, "4 heads"),
        ({"hidden": 192}, "192 columns"),
        ({"hidden": 8192}, "8192 columns"),
        ({"align": 16}, "alignment is 16"),
    ],
)
def test_what_the_kernel_can_not_do_is_said(changed: dict[str, Any], reason: str) -> None:
    able = {"dtype": jnp.bfloat16, "width": 128, "heads": 2, "hidden": 512, "align": 64}
    assert not mosaic.misfit(**able)
    assert reason in mosaic.misfit(**able | changed)


def test_thread_blocks_that_wait_for_each_other_are_no_more_than_multiprocessors() -> None:
    few = {"blocks": 2, "tokens": 66 * 64, "requests": 32, "window": 512, "align": 64}
    assert mosaic.fits(**few)
    assert not mosaic.fits(**few | {"tokens": 67 * 64})
    assert not mosaic.fits(**few | {"window": 1025})
    random = np.random.default_rng(3)
    x = jnp.zeros((BLOCKS, 67 * 64, WIDTH), jnp.bfloat16)
    own = {name: jnp.asarray(w) for name, w in weights(random).items()}
    with pytest.raises(ValueError, match="too many"):
        MOSAIC(
            x,
            own,
            jnp.zeros((4, 7), jnp.int32),
            jnp.zeros(x.shape[:2], jnp.int32),
            temperature=own["temperature"],
            coefficients=None,
            following=None,
            first_candidate=64,
            align=64,
            window=200,
        )
