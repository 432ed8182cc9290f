"""Climber and HSTU (dlrm_v3) in PyTorch on regular batches, from ids to scores; importable only where torch is."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import FunctionType
from typing import Any, Literal

import ml_dtypes
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bench.baselines import torch_attention as forms
from bench.baselines.inputs import Inputs, Run
from bench.baselines.torch_attention import Coefficients, Context, Form, Silu
from bench.baselines.weights import Climber, Layer, climber_weights, hstu_weights, outer_weights
from flame_jax.config import ModelConfig
from flame_jax.models.hstu import SECONDS_PER_STEP

Mode = Literal["eager", "compile", "graph"]
"""`compile` is `torch.compile(mode="max-autotune")`; `graph` is the same kernels in a CUDA graph captured here, which
saves the host's work for every call."""
Options = dict[str, Any]
_COUNTER = itertools.count()

EPSILON = 1e-6


def torch_runs(inputs: Inputs, device: str = "cuda") -> dict[str, Run]:
    """`<mode>_<form>` -> baseline. Nothing is compiled before the first launch, which may fail."""
    climber = inputs.config.model.architecture == "climber"
    offered: dict[str, Any] = forms.CLIMBER if climber else forms.HSTU
    modes: tuple[Mode, ...] = ("eager", "compile", "graph")
    return {
        f"{mode}_{name}": torch_run(inputs, form, mode, device)
        for mode in modes
        for name, form in offered.items()
        if not (mode == "eager" and name.startswith("flex"))  # uncompiled, it is a reference that forms all logits
    }


def torch_run(inputs: Inputs, form: Any, mode: Mode, device: str = "cuda", options: Options | None = None) -> Run:
    """One baseline.

    Args:
        form: of `torch_attention.CLIMBER` or `HSTU`.
        options: of `torch.compile`, in place of its tuning.
    """
    function, arguments = program(inputs, form, torch.device(device))
    made: list[Callable[[], Tensor]] = []

    def launch() -> Tensor:
        with torch.no_grad():
            if not made:
                made.append(_made(lambda f: f(*arguments), function, mode, options or {}))
            return made[0]()

    def wait(output: Tensor) -> Tensor:
        if output.is_cuda:
            torch.cuda.synchronize()
        return output

    return Run(launch, wait, lambda output: output.float().cpu().numpy(), lambda: None)


def _made(call: Callable[[Any], Tensor], function: Any, mode: Mode, options: Options) -> Callable[[], Tensor]:
    if mode == "eager":
        return lambda: call(function)
    # Compiled programs are kept by code object: with one of its own, a baseline is no recompilation of another.
    code = function.__code__.replace(co_name=f"baseline_{next(_COUNTER)}")
    function = FunctionType(code, function.__globals__, code.co_name, None, function.__closure__)
    name = "max-autotune" if mode == "compile" else "max-autotune-no-cudagraphs"
    compiled = torch.compile(function, dynamic=False, fullgraph=True, **(options or {"mode": name}))
    return (lambda: call(compiled)) if mode == "compile" else _captured(lambda: call(compiled))


def _captured(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def program(inputs: Inputs, form: Any, device: torch.device) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """A function to compile, and its arguments on the device."""
    config, regular = inputs.config.model, inputs.regular
    batch, outer = on_device((vars(regular), outer_weights(config, inputs.weights)), device)
    if config.architecture == "climber":
        stack = on_device(climber_weights(config, inputs.weights), device)
        # Masks depend on the shape alone.
        masks = forms.flex_masks(regular.items.shape[2], regular.history, device) if form.flex else None
        return lambda b, s, o: climber_rank(b, s, o, config, form, masks), (batch, stack, outer)
    layers = on_device(hstu_weights(config, inputs.weights), device)
    return lambda b, s, o: hstu_rank(b, s, o, config, form), (batch, layers, outer)


def on_device(tree: Any, device: torch.device) -> Any:
    """Every NumPy array in dictionaries, lists and tuples as a tensor whose address a CUDA graph may rely on."""
    if isinstance(tree, dict):
        return {name: on_device(leaf, device) for name, leaf in tree.items()}
    if isinstance(tree, list):
        return [on_device(leaf, device) for leaf in tree]
    if isinstance(tree, tuple):
        leaves = [on_device(leaf, device) for leaf in tree]
        return type(tree)(*leaves) if hasattr(tree, "_fields") else tuple(leaves)
    narrow = tree.dtype == ml_dtypes.bfloat16
    tensor = torch.from_numpy(np.array(tree.view(np.int16) if narrow else tree)).to(device)
    tensor = tensor.view(torch.bfloat16) if narrow else tensor
    torch._dynamo.mark_static_address(tensor)
    return tensor


def climber_rank(batch: Layer, stack: Climber, outer: Layer, config: ModelConfig, form: Form, masks: Any) -> Tensor:
    """Probabilities float32[B, c, tasks]."""
    z = climber_stack(embed(batch, outer, config), batch, stack, config.heads, form, masks)
    return scores(fuse(z.movedim(0, 2), batch["scenario"], outer, config.heads), batch, outer)


def climber_stack(x: Tensor, batch: Layer, weights: Climber, heads: int, form: Form, masks: Any) -> Tensor:
    """Climber's layers: x [blocks, B, h + c, d] -> [blocks, B, c, d]."""
    blocks, requests, tokens, width = x.shape
    history, n = batch["times"].shape[2], blocks * requests
    context = make_context(batch, tokens, form, masks, x.dtype)
    inverse = weights.inverse[:, :, batch["scenario"]].flatten(1, 2)
    bias = weights.bias[:, :, batch["scenario"]].flatten(1, 2) * inverse[..., None]
    x = x.reshape(blocks, -1, width)
    for index, layer in enumerate(weights.layers):
        qkv = linear(x, layer["qkv_w"], layer["qkv_b"]).view(n, tokens, 3, heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if index == len(weights.layers) - 1:
            q = q[:, :, history:]
            x = x.view(n, tokens, width)[:, history:].reshape(blocks, -1, width)
        q = (q * inverse[index][:, :, None, None]).to(x.dtype)
        attended = form.attend(q, k, v, Coefficients(bias[index]), context)
        x = post_attention(attended.transpose(1, 2).reshape(blocks, x.shape[1], -1), x, layer)
    return x.view(blocks, requests, -1, width)


def make_context(batch: Layer, tokens: int, form: Form, masks: Any, dtype: torch.dtype) -> Context:
    """Logs are computed once and kept in `dtype`."""
    times = batch["times"]
    history = times.shape[2]
    asked = batch["request_time"][:, None].expand(*times.shape[:2], tokens - history)
    time = torch.cat([times, asked], 2).flatten(0, 1)
    position = torch.arange(tokens, device=times.device).clamp(max=history)
    keys = (tokens if form.every_key else history) if form.logs else 0

    def log2_distance(rows: Tensor) -> Tensor:
        return torch.log2(1.0 + (rows[..., :, None] - rows[..., None, :keys]).abs().float()).to(dtype)

    return Context(time, log2_distance(position), log2_distance(time), masks, history)


def post_attention(attended: Tensor, x: Tensor, layer: Layer) -> Tensor:
    """See `flame_jax.pallas_kernels.post_attention`."""
    mixed = linear(attended, layer["out_w"], layer["out_b"])
    x = layer_norm(x + mixed, layer["norm1_scale"], layer["norm1_shift"])
    hidden = linear(functional.relu(linear(x, layer["ffn1_w"], layer["ffn1_b"])), layer["ffn2_w"], layer["ffn2_b"])
    return layer_norm(x + hidden, layer["norm2_scale"], layer["norm2_shift"])


def hstu_rank(batch: Layer, layers: list[Layer], outer: Layer, config: ModelConfig, attend: Any) -> Tensor:
    """Probabilities float32[B, c, tasks]."""
    x = encode(embed(batch, outer, config)[0], batch, outer, config)
    y = hstu_stack(x, layers, batch["times"].shape[2], config, attend)
    return scores(layer_norm(y, outer["final_scale"], outer["final_shift"]), batch, outer)


def hstu_stack(x: Tensor, layers: list[Layer], history: int, config: ModelConfig, attend: Any) -> Tensor:
    """HSTU's layers: x [B, h + c, D] -> [B, c, D]."""
    heads, silu = config.heads, Silu(config.head_dim**-0.5, config.hstu.attention_divisor, history)
    sizes = [heads * config.hstu.value_dim] * 2 + [heads * config.head_dim] * 2
    for index, layer in enumerate(layers):
        first = history if index == len(layers) - 1 else 0
        mixed = layer_norm(x, layer["input_scale"], layer["input_shift"])
        u, v, q, k = linear(mixed, layer["uvqk_w"], layer["uvqk_b"]).split(sizes, -1)
        u, x, q = functional.silu(u[:, first:]), x[:, first:], q[:, first:]
        q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
        o = attend(q, k, v, silu).transpose(1, 2).flatten(2)
        gated = u * layer_norm(o, layer["output_scale"], layer["output_shift"])
        x = x + torch.cat([u, o, gated], -1) @ layer["out_w"]
    return x


def encode(x: Tensor, batch: Layer, outer: Layer, config: ModelConfig) -> Tensor:
    """x [B, h + c, D] with DLRMv3's position and time tables, when there are any."""
    times, rows = batch["times"][0], x.shape[1]
    history = times.shape[1]
    if "position" in outer or "time" in outer:
        x = x * config.width**0.5
    if "position" in outer:
        row = (history - torch.arange(rows, device=x.device)).clamp(0, len(outer["position"]) - 1)
        x = x + outer["position"].to(x.dtype)[row]
    if "time" in outer:
        minutes = (batch["request_time"][:, None] - times).clamp(min=0) // SECONDS_PER_STEP
        row = minutes.double().sqrt().long().clamp(max=len(outer["time"]) - 1)  # exact below 2^52
        x = x + outer["time"].to(x.dtype)[functional.pad(row, (0, rows - history))]
    return x


def embed(batch: Layer, outer: Layer, config: ModelConfig) -> Tensor:
    """[blocks, B, h + c, d] in the model's dtype."""
    rows = outer["item"][batch["items"]].float() + outer["action"][batch["actions"]].float()
    return rows.to(getattr(torch, config.dtype))


def fuse(z: Tensor, scenario: Tensor, outer: Layer, heads: int) -> Tensor:
    """Climber's bit-wise gating fusion: z [B, c, blocks, d] -> [B, c, blocks * d]."""
    gate, layer = outer["gate"], outer["fusion"]
    qkv = linear(z, layer["qkv_w"], layer["qkv_b"]).unflatten(-1, (3, heads, -1))
    q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)
    # A handful of blocks: products element by element instead of a batch of tiny matrix products.
    logits = (q[..., :, None, :].float() * k[..., None, :, :].float()).sum(-1)
    shares = (logits * layer["inverse"][scenario][:, None, :, None, None]).softmax(-1).to(v.dtype)
    mixed = (shares[..., None].float() * v[..., None, :, :].float()).sum(-2).to(v.dtype)
    bits = post_attention(mixed.transpose(2, 3).flatten(3), z, layer).flatten(2)
    squeezed = functional.relu(linear(bits, gate["squeeze_w"], gate["squeeze_b"]))
    return bits * torch.sigmoid(linear(squeezed, gate["excite_w"], gate["excite_b"]))


def scores(y: Tensor, batch: Layer, outer: Layer) -> Tensor:
    """y [B, c, m] -> probabilities float32[B, c, tasks]."""
    head, candidates = outer["head"], y.shape[1]
    flat = y.flatten(0, 1)
    experts = functional.relu(torch.einsum("cm,emh->ech", flat, head["expert_w"]) + head["expert_b"][:, None])
    mix = torch.einsum("cm,tme->tce", flat, head["mix_w"]) + head["mix_b"][:, None]
    mixed = torch.einsum("tce,ech->tch", mix.float().softmax(-1).to(y.dtype), experts)
    tower = functional.relu(torch.einsum("tch,thk->tck", mixed, head["tower_w"]) + head["tower_b"][:, None])
    logits = torch.einsum("tck,tk->ct", tower.float(), head["logit_w"]) + head["logit_b"]
    return (logits.view(*y.shape[:2], -1) + outer["item_bias"][batch["items"][0, :, -candidates:]]).sigmoid()


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [..., n, i], weight [i, o], or both with a leading axis of blocks."""
    if weight.ndim == 3:
        return torch.baddbmm(bias[:, None], x, weight)
    return torch.addmm(bias, x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])


def layer_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """In float32, back in x's dtype. x [..., n, d]; scale, shift [..., d]."""
    normed = functional.layer_norm(x.float(), x.shape[-1:], eps=EPSILON)
    return (normed * scale[..., None, :] + shift[..., None, :]).to(x.dtype)
