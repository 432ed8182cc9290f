"""A stack of layers against the float64 oracle, one after another and as one kernel alike."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flame_jax.packing import Bucket, Layout, Place
from flame_jax.pallas_kernels.kernels import REFERENCE
from flame_jax.pallas_kernels.layer_stack import mosaic
from flame_jax.pallas_kernels.layer_stack.api import layer_stack
from flame_jax.pallas_kernels.post_attention.types import Projection
from flame_jax.pallas_kernels.segments import owned
from flame_jax.schema import Block, FeatureSchema
from tests.oracles import climber as oracle
from tests.oracles.climber import OracleRequest
from tests.packed import Packed, pack, random_request

Weights = dict[str, np.ndarray]
LAYERS, BLOCKS, WIDTH, FFN, HEADS = 2, 2, 128, 256, 2
SCHEMA = FeatureSchema(scenarios=("a", "b"), blocks=(Block("x"), Block("y")), block_length=200)
LAYOUT, BUCKET = Layout(align=64, max_requests=4), Bucket(384, 192)
FIRST = BUCKET.tokens - BUCKET.candidates
MOSAIC = partial(mosaic.layer_stack, interpret=True)


def weights(random: np.random.Generator) -> Weights:
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


def run(implementation: str, x: np.ndarray, packed: Packed, own: Weights, **changed: Any) -> Any:
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


def requests_and(random: np.random.Generator) -> tuple[list[OracleRequest], Packed]:
    """Two requests; the second history reaches into the bucket's candidate part."""
    requests = [
        random_request(SCHEMA, random, lengths=n, candidates=c, rows=9) for n, c in (([20, 50], 3), ([130, 70], 60))
    ]
    packed = pack(SCHEMA, LAYOUT, BUCKET, requests, dirt=random)
    assert packed.places[1].history_start + 130 > FIRST
    return requests, packed


def parts(request: OracleRequest, where: Place) -> tuple[list[slice], slice]:
    """Token rows: of each block's history, and of the candidates."""
    histories = [slice(where.history_start, where.history_start + len(items)) for items, *_ in request.blocks]
    return histories, slice(where.candidate_start, where.candidate_start + len(request.candidates))


def poisoned(x: np.ndarray, requests: list[OracleRequest], places: list[Place]) -> np.ndarray:
    """x of the requests, NaN elsewhere."""
    found = np.full_like(x, np.nan)
    for request, where in zip(requests, places, strict=True):
        histories, candidates = parts(request, where)
        found[:, candidates] = x[:, candidates]
        for block, mine in enumerate(histories):
            found[block, mine] = x[block, mine]
    return found


def check(
    found: list[np.ndarray], x: np.ndarray, requests: list[OracleRequest], packed: Packed, own: Weights, limit: float
) -> None:
    """Every candidate row against the oracle, and q, k and v of what follows."""
    given = {f"layers/{name}": w.astype(np.float64) for name, w in own.items()}
    for request, where in zip(requests, packed.places, strict=True):
        histories, candidates = parts(request, where)
        slot = slice(candidates.start - FIRST, candidates.stop - FIRST)
        for block, (items, actions, times) in enumerate(request.blocks):
            tokens = given | {"item": x[block, histories[block]].astype(np.float64), "action": np.zeros((1, WIDTH))}
            blocks = {block: (np.arange(len(items)), np.zeros_like(actions), times)}
            asked = replace(request, blocks=[blocks.get(n, old) for n, old in enumerate(request.blocks)])
            of_block = x[block, candidates].astype(np.float64)
            y = oracle.run_block(tokens, asked, block, of_block, heads=HEADS, head_dim=WIDTH // HEADS)
            after = y @ own["qkv_w"][0, 0].astype(np.float64) + own["qkv_b"][0, 0]
            for mine, theirs in zip(found, (y, *np.split(after, 3, axis=-1)), strict=True):
                np.testing.assert_allclose(mine[block, slot], theirs, rtol=0, atol=limit)


def test_layers_one_after_another_match_the_oracle() -> None:
    random = np.random.default_rng(0)
    own, x = weights(random), some_x(random)
    requests, packed = requests_and(random)
    check(run("xla", x, packed, own), x, requests, packed, own, 1e-4)


def test_one_kernel_matches_the_oracle_whatever_an_earlier_batch_left_and_in_any_company() -> None:
    random = np.random.default_rng(0)
    own, x = weights(random), some_x(random)
    requests, packed = requests_and(random)
    found = run("mosaic", poisoned(x, requests, packed.places), packed, own)
    assert all(np.isfinite(part).all() for part in found)
    check(found, x, requests, packed, own, 0.08)

    alone, moved = pack(SCHEMA, LAYOUT, BUCKET, requests[1:], dirt=random), x.copy()
    (histories, here), (elsewhere, there) = (parts(requests[1], place) for place in (packed.places[1], alone.places[0]))
    moved[:, there] = x[:, here]
    for block, (source, to) in enumerate(zip(histories, elsewhere, strict=True)):
        moved[block, to] = x[block, source]
    same = run("mosaic", poisoned(moved, requests[1:], alone.places), alone, own)
    assert here != there
    for mine, theirs in zip(found, same, strict=True):
        assert (mine[:, here.start - FIRST : here.stop - FIRST] == theirs[:, there.start - FIRST :][:, :60]).all()


def test_whose_rows_there_are() -> None:
    requests, packed = requests_and(np.random.default_rng(2))
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
