"""Weights of NVIDIA recsys-examples' HSTU layers (`_hstu_block._attention_layers`) as our `recsys_examples` stack."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from flame_jax.models.public_layers import PublicStack, Sizes, Spelling, Spellings


def _spell(sizes: Sizes, width: int) -> Spellings:
    """The native layer's linear modules keep (out, in); the fused layer's plain parameters keep (in, out)."""
    values, mixed = sizes.values, sizes.mixed
    return {
        "uvqk_w": (
            Spelling("_linear_uvqk.weight", (mixed, width), transposed=True),
            Spelling("_linear_uvqk_weight", (width, mixed)),
        ),
        "uvqk_b": (Spelling("_linear_uvqk.bias", (mixed,)), Spelling("_linear_uvqk_bias", (mixed,))),
        "input_scale": (Spelling("_input_layernorm_weight", (width,)),),
        "input_shift": (Spelling("_input_layernorm_bias", (width,)),),
        "output_scale": (Spelling("_output_layernorm_weight", (values,)),),
        "output_shift": (Spelling("_output_layernorm_bias", (values,)),),
        "out_w": (
            Spelling("_linear_proj.weight", (width, values), transposed=True),
            Spelling("_linear_proj_weight", (values, width)),
        ),
    }


RECSYS_EXAMPLES = PublicStack("a stack of recsys-examples' layers", "_attention_layers", _spell)


def layers_from_recsys_examples(
    state: Mapping[str, np.ndarray],
    *,
    num_heads: int,
    attention_dim: int,
    hidden_dim: int,
    heads_outermost: bool = False,
) -> dict[str, np.ndarray]:
    """A block's tensors to our stacked `layers/...` weights (docs/models.md, `recsys_examples`), float32[layers, ...].

    Args:
        state: `_hstu_block._attention_layers.{i}.<name>`, under any one prefix, in the native or the fused layer's
            spelling.
        attention_dim: a head's queries and keys.
        hidden_dim: a head's values.
        heads_outermost: the projection's columns lie head by head, each with its own u, v, q and k, as the earlier
            native layer and the debug layer read them; otherwise all of u, then v, q and k.

    Raises:
        ValueError: naming every missing, extra and misshapen tensor.
    """
    sizes = Sizes(num_heads, attention_dim, hidden_dim)
    weights = RECSYS_EXAMPLES.layers(state, sizes)
    return heads_inside(weights, sizes) if heads_outermost else weights


def heads_inside(weights: Mapping[str, np.ndarray], sizes: Sizes) -> dict[str, np.ndarray]:
    """Reorder a projection whose columns lie [heads, (u, v, q, k)] to ours: u | v | q | k, each head-major."""
    columns = np.arange(sizes.mixed).reshape(sizes.heads, -1)
    dv, dqk = sizes.hidden_dim, sizes.attention_dim
    order = np.concatenate([part.ravel() for part in np.split(columns, [dv, 2 * dv, 2 * dv + dqk], axis=1)])
    moved = {name: np.ascontiguousarray(w[..., order]) for name, w in weights.items() if name.startswith("uvqk_")}
    return {**weights, **moved}
