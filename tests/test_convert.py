"""Weights in and out through the command line: every tensor has a place or is named."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from flame_jax.config import Config, HeadConfig, HstuConfig, ModelConfig
from flame_jax.convert import PROG, main
from flame_jax.models.checkpoint import Checkpoint, CheckpointFolder, load_checkpoint
from flame_jax.models.interchange import load_safetensors, save_safetensors
from flame_jax.models.registry import make_ranker
from flame_jax.models.serving import abstract_model, check_weights, flat_weights, rank_function, weight_specs
from flame_jax.packing import Bucket, Layout, slot_layout
from flame_jax.schema import Feature, FeatureSchema
from flame_jax.vocabulary import Vocabularies, Vocabulary
from tests import tiny
from tests.models.test_interchange import assert_same
from tests.oracles import hstu
from tests.packed import pack, random_request

SCHEMA = FeatureSchema(
    tasks=("like", "love"),
    actions=4,
    block_length=12,
    item_features=(
        Feature("genres", "bits", 5),
        Feature("maker", "id", 6, "table"),
        Feature("shop", "categorical", 4, "table"),
        Feature("price", "numeric", 0, "table"),
    ),
    user_features=(Feature("age", "numeric"),),
)
MODEL = ModelConfig(
    architecture="hstu",
    name="brought",
    width=12,
    layers=2,
    heads=2,
    head_dim=4,
    position_rows=7,
    head=HeadConfig(2, 8, 4),
    hstu=HstuConfig(variant="dlrm_v3", value_dim=6, attention_divisor=20.0),
)
NVIDIA = dataclasses.replace(MODEL, hstu=dataclasses.replace(MODEL.hstu, variant="recsys_examples"))
IDS = np.array([70, 2**40 + 3, 5, 11, 900, 2**40, 8], np.int64)
MAKERS = np.array([30, 2**50, 10], np.int64)
"""Keys of an id feature whose table has room for three more."""
VOCABULARIES = Vocabularies(Vocabulary(IDS), {"item.maker": Vocabulary(MAKERS)})
ROWS = len(IDS) + 1
META_NAMES = {
    "uvqk_w": "_uvqk_weight",
    "uvqk_b": "_uvqk_beta",
    "input_scale": "_input_norm_weight",
    "input_shift": "_input_norm_bias",
    "output_scale": "_output_norm_weight",
    "output_shift": "_output_norm_bias",
    "out_w": "_output_weight",
}
FUSED_NAMES = {
    "uvqk_w": "_linear_uvqk_weight",
    "uvqk_b": "_linear_uvqk_bias",
    "input_scale": "_input_layernorm_weight",
    "input_shift": "_input_layernorm_bias",
    "output_scale": "_output_layernorm_weight",
    "output_shift": "_output_layernorm_bias",
    "out_w": "_linear_proj_weight",
}
Tensors = dict[str, np.ndarray]


@cache
def initial(model: ModelConfig = MODEL) -> Tensors:
    return flat_weights(make_ranker(model, SCHEMA, ROWS, rngs=nnx.Rngs(0)))


@cache
def ours(model: ModelConfig = MODEL) -> Tensors:
    """Weights under our names, every one away from its initial value; rows of `item` in ascending order of ids."""
    random = np.random.default_rng(0)
    weights = {n: (w + 0.3 * random.normal(size=w.shape)).astype(w.dtype) for n, w in initial(model).items()}
    makers = np.concatenate([[0], random.integers(1, 4, ROWS - 1)]).astype(np.int32)
    return weights | {"columns/item.shop": random.integers(0, 4, ROWS).astype(np.int32), "columns/item.maker": makers}


def theirs(model: ModelConfig = MODEL, prefix: str = "_stu_layers.", names: dict[str, str] | None = None) -> Tensors:
    """The same under public names; rows of the item tables in the order of IDS."""
    out: Tensors = {}
    for name, value in ours(model).items():
        if name.startswith("layers/"):
            for i in range(model.layers):
                out[f"{prefix}{i}.{(names or META_NAMES)[name.removeprefix('layers/')]}"] = value[i]
        else:
            out[name] = value
    rows = [sorted(IDS.tolist()).index(id_) + 1 for id_ in IDS.tolist()]
    for name in ("item", "item_bias", "columns/item.shop", "columns/item.price", "columns/item.maker"):
        out[name] = out[name][[0, *rows]]
    rows = [sorted(MAKERS.tolist()).index(key) + 1 for key in MAKERS.tolist()]
    out["features/item.maker"] = out["features/item.maker"][[0, *rows, 4, 5, 6]]
    # A column of ids holds rows of the feature's table: theirs.
    out["columns/item.maker"] = np.array(
        [[0, *rows].index(row) for row in out["columns/item.maker"].tolist()], np.int32
    )
    return out | {"vocabulary": IDS, "vocabulary/item.maker": MAKERS}


class Desk:
    """A folder to convert in."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys
        self.out = folder / "out"

    def source(self, tensors: Tensors, ending: str = "npz") -> str:
        path = self.folder / f"source.{ending}"
        if ending == "npz":
            np.savez(path, **tensors)  # type: ignore[arg-type]
        else:
            safetensors.numpy.save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, path)
        return str(path)

    def config(self, model: ModelConfig = MODEL, schema: FeatureSchema = SCHEMA) -> list[str]:
        settings = dataclasses.replace(Config(), model=model, schema=schema)
        return ["--config", tiny.write_config(settings, self.folder / "config.yaml")]

    def run(self, *arguments: str) -> str:
        """Convert and give back what was printed."""
        self._capsys.readouterr()
        main([*arguments, "--out", str(self.out)])
        return self._capsys.readouterr().out

    def refusal(self, *arguments: str, status: int = 1) -> str:
        """The one line that a conversion ends with; nothing may be written."""
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            self.run(*arguments)
        assert ended.value.code == status
        captured = self._capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith(f"{PROG}: error: ")
        assert captured.err.count("\n") == 1
        assert not self.out.exists()
        return captured.err

    def meta(self, tensors: Tensors, *arguments: str) -> list[str]:
        return ["--from", "meta-stu", self.source(tensors), *self.config(), *arguments]


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(tmp_path, capsys)


def assert_is_ours(checkpoint: Checkpoint, model: ModelConfig = MODEL) -> None:
    """The whole model, rows of the item tables in ascending order of ids."""
    assert (checkpoint.step, checkpoint.model, checkpoint.schema) == (0, model, SCHEMA)
    assert checkpoint.vocabularies.items.keys.tolist() == sorted(IDS.tolist())
    assert checkpoint.vocabularies.features["item.maker"].keys.tolist() == sorted(MAKERS.tolist())
    assert list(checkpoint.optimizer) == []
    assert set(checkpoint.weights) == set(ours(model))
    for name, value in ours(model).items():
        assert np.array_equal(checkpoint.weights[name], value), name


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_a_stu_stack_with_the_rest_under_our_names(ending: str, desk: Desk) -> None:
    source = desk.source(theirs(prefix="_hstu_transducer._stu_module._stu_layers."), ending)
    printed = desk.run("--from", "meta-stu", source, *desk.config())
    checkpoint = load_checkpoint(desk.out)
    checkpoint.check_fits(MODEL, SCHEMA, desk.out)
    check_weights(weight_specs(abstract_model(MODEL, SCHEMA, ROWS)), checkpoint.weights)
    assert_is_ours(checkpoint)
    assert f"model brought, step 0, {len(ours())} weights, {len(ours())} of them from SRC, 7 items" in printed
    assert "fresh: none; ignored: none" in printed


@pytest.mark.parametrize("names", ["native", "fused", "heads outermost"])
def test_recsys_examples_layers(names: str, desk: Desk) -> None:
    tensors = theirs(NVIDIA, "module._hstu_block._attention_layers.", FUSED_NAMES)
    flags: list[str] = []
    if names == "native":
        for name in [name for name in tensors if "_linear_" in name]:
            head, _, kind = name.rpartition("_")
            tensors[f"{head}.{kind}"] = tensors.pop(name).T
    elif names == "heads outermost":
        flags = ["--heads-outermost"]
        for name in [name for name in tensors if "_linear_uvqk" in name]:
            u, v, q, k = (p.reshape(*p.shape[:-1], 2, -1) for p in np.split(tensors[name], [12, 24, 32], axis=-1))
            tensors[name] = np.concatenate([u, v, q, k], axis=-1).reshape(tensors[name].shape)
    desk.run("--from", "recsys-examples", desk.source(tensors), *desk.config(NVIDIA), *flags)
    assert_is_ours(load_checkpoint(desk.out), NVIDIA)


def test_a_converted_model_scores_as_the_oracle_does(desk: Desk) -> None:
    """From the command line to probabilities, against the float64 reference over what the source held."""
    desk.run(*desk.meta(theirs()))
    checkpoint = load_checkpoint(desk.out)
    layout, bucket, random = Layout(align=8, max_requests=2), Bucket(48, 16), np.random.default_rng(0)
    request = random_request(SCHEMA, random, lengths=[9], candidates=5, rows=ROWS)
    slot = slot_layout(SCHEMA, layout, bucket)
    packed = pack(SCHEMA, layout, bucket, [request], dirt=random)
    flat = [checkpoint.weights[name] for name in initial()]
    with jax.default_matmul_precision("highest"):
        scores = np.asarray(jax.jit(rank_function(MODEL, SCHEMA, layout, slot, ROWS))(flat, packed.words))
    right = hstu.rank(ours(), SCHEMA, request, hstu.Settings("dlrm_v3", 2, 4, 6, 20.0))
    first = packed.places[0].candidate_start - (bucket.tokens - bucket.candidates)
    np.testing.assert_allclose(scores[first : first + 5], right, rtol=1e-5, atol=1e-5)


def test_names_of_ours_without_our_metadata(desk: Desk) -> None:
    tensors = ours() | {"vocabulary": np.sort(IDS), "vocabulary/item.maker": np.sort(MAKERS)}
    desk.run("--from", "flame", desk.source(tensors, "safetensors"), *desk.config())
    assert_is_ours(load_checkpoint(desk.out))


def test_a_vocabulary_file_in_another_order(desk: Desk) -> None:
    tensors = theirs()
    np.save(desk.folder / "ids.npy", tensors.pop("vocabulary"))
    desk.run(*desk.meta(tensors, "--vocabulary", str(desk.folder / "ids.npy")))
    assert_is_ours(load_checkpoint(desk.out))


def test_keys_of_an_id_feature_come_from_a_file_of_their_own(desk: Desk) -> None:
    tensors = theirs()
    np.save(desk.folder / "makers.npy", tensors.pop("vocabulary/item.maker"))
    assert "no ids of item.maker" in desk.refusal(*desk.meta(tensors))
    assert "item.colour" in desk.refusal(*desk.meta(tensors, "--vocabulary", f"item.colour={desk.folder}/makers.npy"))
    (desk.folder / "lr=1").mkdir()
    np.save(desk.folder / "lr=1" / "ids.npy", tensors.pop("vocabulary"))
    files = [f"item.maker={desk.folder}/makers.npy", f"{desk.folder}/lr=1/ids.npy"]
    desk.run(*desk.meta(tensors, "--vocabulary", files[0], "--vocabulary", files[1]))
    assert_is_ours(load_checkpoint(desk.out))


def test_more_keys_than_the_feature_has_room_for_are_refused(desk: Desk) -> None:
    tensors = theirs() | {"vocabulary/item.maker": np.arange(7)}
    assert "item.maker has 7 ids, its size is 6" in desk.refusal(*desk.meta(tensors))


def test_columns_keep_the_kind_of_their_feature(desk: Desk) -> None:
    wrong = theirs()
    wrong["columns/item.shop"] = wrong["columns/item.shop"].astype(np.float32)
    wrong["columns/item.price"] = np.arange(ROWS)
    said = desk.refusal(*desk.meta(wrong))
    assert "columns/item.shop is float32, expected int32" in said
    assert "columns/item.price is int64, expected float32" in said
    wide = theirs() | {"columns/item.shop": np.full(ROWS, 2**31)}
    assert "columns/item.shop has values that do not fit int32" in desk.refusal(*desk.meta(wide))
    wide = theirs() | {"columns/item.shop": np.full(ROWS, 4), "columns/item.maker": np.full(ROWS, -1)}
    said = desk.refusal(*desk.meta(wide))
    assert "columns/item.shop has values outside [0, 4)" in said
    assert "columns/item.maker has values outside [0, 4)" in said


def test_tables_without_an_unknown_row_get_one_of_zeros(desk: Desk) -> None:
    tensors = theirs()
    by_id = (
        "item",
        "item_bias",
        "features/item.maker",
        "columns/item.shop",
        "columns/item.price",
        "columns/item.maker",
    )
    for name in by_id:
        tensors[name] = tensors[name][1:]
    tensors["columns/item.maker"] = tensors["columns/item.maker"] - 1
    assert "item is (7, 12), expected (8, 12)" in desk.refusal(*desk.meta(tensors))
    desk.run(*desk.meta(tensors, "--no-unknown-row"))
    found = load_checkpoint(desk.out).weights
    for name in by_id:
        assert np.array_equal(found[name][1:], ours()[name][1:])
        assert not found[name][0].any()


def test_an_unknown_row_that_is_there_is_noticed(desk: Desk) -> None:
    assert "item is (8, 12), expected (7, 12)" in desk.refusal(*desk.meta(theirs(), "--no-unknown-row"))


def test_renamed_fresh_and_ignored(desk: Desk) -> None:
    tensors = theirs()
    tensors["_embedding_tables.item.weight"] = tensors.pop("item")
    tensors["item_ids"] = tensors.pop("vocabulary")
    tensors["optimizer.step"] = np.array(3, np.int64)
    tensors["_stu_layers.0._buffer"] = np.full(3, np.nan, np.float32)
    for name in [name for name in tensors if name.startswith("head/")] + ["item_bias"]:
        del tensors[name]
    flags = [
        *("--rename", "item=_embedding_tables.item.weight", "--rename", "vocabulary=item_ids"),
        *("--fresh", "head/*", "--fresh", "item_bias", "--ignore", "optimizer.*", "--ignore", "*._buffer"),
    ]
    printed = desk.run(*desk.meta(tensors, *flags))
    found = load_checkpoint(desk.out)
    assert found.vocabularies.items.keys.tolist() == sorted(IDS.tolist())
    left = [name for name in ours() if name.startswith("head/") or name == "item_bias"]
    for name, value in ours().items():
        assert np.array_equal(found.weights[name], initial()[name] if name in left else value), name
    assert f"{len(ours())} weights, {len(ours()) - len(left)} of them from SRC" in printed
    assert all(name in printed.partition("fresh: ")[2].partition(";")[0] for name in left)
    assert "ignored: optimizer.step, _stu_layers.0._buffer" in printed


def test_fresh_weights_are_the_seeds(desk: Desk) -> None:
    tensors = theirs()
    del tensors["action"]
    desk.run(*desk.meta(tensors, "--fresh", "action", "--train.seed", "5"))
    expected = flat_weights(make_ranker(MODEL, SCHEMA, ROWS, rngs=nnx.Rngs(5)))["action"]
    assert np.array_equal(load_checkpoint(desk.out).weights["action"], expected)


def test_norms_without_weights_may_be_fresh(desk: Desk) -> None:
    """Ones and zeros, which is what a norm without weights is."""
    tensors = {name: value for name, value in theirs().items() if "_input_norm" not in name}
    desk.run(*desk.meta(tensors, "--fresh", "layers/input_*"))
    found = load_checkpoint(desk.out).weights
    assert (found["layers/input_scale"] == 1).all()
    assert (found["layers/input_shift"] == 0).all()
    assert np.array_equal(found["layers/uvqk_w"], ours()["layers/uvqk_w"])


def test_everything_that_does_not_fit_is_named_in_one_go(desk: Desk) -> None:
    tensors = theirs()
    del tensors["_stu_layers.1._uvqk_beta"], tensors["final_scale"]
    tensors["_stu_layers.0._more"] = np.zeros(3, np.float32)
    tensors["stray"] = np.zeros(3, np.float32)
    tensors["_stu_layers.0._uvqk_weight"] = tensors["_stu_layers.0._uvqk_weight"].T
    tensors["action"] = tensors["action"][:-1]
    tensors["position"] = np.zeros((7, 12), np.int64)
    tensors["final_shift"] = np.full(12, np.inf, np.float32)
    tensors["_stu_layers.1._output_weight"] = np.full((36, 12), np.nan, np.float32)
    flags = ["--rename", "colour=stray2", "--fresh", "heads/*", "--ignore", "nothing*"]
    said = desk.refusal(*desk.meta(tensors, *flags))
    for part in (
        "missing _stu_layers.1._uvqk_beta",
        "missing final_scale",
        "extra _stu_layers.0._more",
        "extra stray",
        "_stu_layers.0._uvqk_weight is (40, 12), expected (12, 40)",
        "action is (4, 12), expected (5, 12)",
        "position is int64",
        "final_shift is not finite",
        "_stu_layers.1._output_weight is not finite",
        "--rename colour",
        "--fresh heads/*",
        "--ignore nothing*",
    ):
        assert part in said
    assert "vocabulary" not in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rename", "item=gone"], "missing gone"),
        (["--rename", "layers/out_w=item"], "layers come from their public names"),
        (["--rename", "final_scale=final_shift"], "final_shift is used twice"),
        (["--rename", "item_bias=_stu_layers.0._uvqk_beta"], "_stu_layers.0._uvqk_beta is used twice"),
        (["--rename", "item=item", "--fresh", "item"], "item is both renamed and fresh"),
        (["--fresh", "item"], "extra item"),
        (["--ignore", "item"], "missing item"),
        (["--model.layers", "3"], "2 layers, and model.layers is 3"),
        (["--model.width=16"], "_stu_layers.0._uvqk_weight is (12, 40), expected (16, 40)"),
        (["--model.heads=4"], "_uvqk_weight is (12, 40), expected (12, 80)"),
        (["--ignore", "_stu_layers.*"], "no _stu_layers.0"),
        (["--ignore", "vocabulary"], "--vocabulary"),
        (["--rename", "vocabulary=ids"], "no tensor ids"),
        (["--rename", "vocabulary=item"], "ids are int64"),
        (["--vocabulary", "gone.npy"], "gone.npy"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_choices_that_do_not_hold_are_refused(flags: list[str], said: str, desk: Desk) -> None:
    assert said in desk.refusal(*desk.meta(theirs(), *flags))


def test_two_stacks_are_refused_unless_one_is_ignored(desk: Desk) -> None:
    tensors = theirs() | {f"ema.{name}": value for name, value in theirs().items() if name.startswith("_stu")}
    assert "at _stu_layers and ema._stu_layers" in desk.refusal(*desk.meta(tensors))
    desk.run(*desk.meta(tensors, "--ignore", "ema.*"))
    assert_is_ours(load_checkpoint(desk.out))


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (IDS.astype(np.int32), "int64"),
        (np.array([3, 3, 4, 5, 6, 7, 8], np.int64), "distinct"),
        (np.array([-1, 3, 4, 5, 6, 7, 8], np.int64), "non-negative"),
        (IDS[:-1], "item is (8, 12), expected (7, 12)"),
    ],
    ids=["int32", "repeated", "negative", "too few"],
)
@pytest.mark.parametrize("place", ["file", "tensor"])
def test_ids_that_do_not_fit_are_refused(place: str, ids: np.ndarray, said: str, desk: Desk) -> None:
    if place == "tensor":
        assert said in desk.refusal(*desk.meta(theirs() | {"vocabulary": ids}))
        return
    np.save(desk.folder / "ids.npy", ids)
    tensors = {name: value for name, value in theirs().items() if name != "vocabulary"}
    assert said in desk.refusal(*desk.meta(tensors, "--vocabulary", str(desk.folder / "ids.npy")))


@pytest.mark.parametrize(
    ("source", "model", "asked"),
    [
        ("meta-stu", NVIDIA, "hstu, variant recsys_examples"),
        ("recsys-examples", MODEL, "hstu, variant dlrm_v3"),
        ("meta-stu", tiny.MODEL, "climber"),
    ],
    ids=["meta-stu", "recsys-examples", "climber"],
)
def test_another_model_than_the_layers_are_of_is_refused(
    source: str, model: ModelConfig, asked: str, desk: Desk
) -> None:
    said = desk.refusal("--from", source, desk.source({}), *desk.config(model))
    assert f"--from {source} has layers of hstu, variant " in said
    assert f"asks for {asked}" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--from", "pickle"], "pickle"),
        (["--from", "meta-stu", "--heads-outermost"], "--heads-outermost"),
        (["--from", "meta-stu", "--rename", "item"], "OURS=THEIRS"),
        (["--from", "meta-stu", "--rename", "item=a", "--rename", "item=b"], "once"),
        (["--from", "meta-stu", "--colour", "red"], "--colour"),
        ([], "--from"),
        (["--from", "meta-stu", "--model.colour", "red"], "colour"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_end_with_status_2(arguments: list[str], said: str, desk: Desk) -> None:
    assert said in desk.refusal(desk.source({}), *desk.config(), *arguments, status=2)


def test_what_is_not_there_or_does_not_say_what_it_is(desk: Desk) -> None:
    assert "nothing at" in desk.refusal("--from", "flame", str(desk.folder / "gone"))
    assert "--config" in desk.refusal("--from", "flame", desk.source(ours()))
    assert "--config" in desk.refusal("--from", "meta-stu", desk.source(theirs()))


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_what_exists_is_left_alone(name: str, desk: Desk) -> None:
    desk.out = desk.folder / name
    desk.out.write_text("precious")
    with pytest.raises(SystemExit):
        desk.run(*desk.meta(theirs()))
    assert desk.out.read_text() == "precious"


# Checkpoints of ours.


def own() -> Checkpoint:
    return Checkpoint(
        step=4,
        model=MODEL,
        schema=SCHEMA,
        vocabularies=VOCABULARIES,
        weights=ours(),
        optimizer=[np.array(4, np.int32), np.arange(6, dtype=np.float32).reshape(2, 3)],
        training={"learning_rate": 0.1, "label_actions": {"like": [3]}},
    )


@pytest.fixture
def folder(desk: Desk) -> str:
    path = desk.folder / "checkpoint"
    with CheckpointFolder(path) as opened:
        opened.save(own())
    return str(path)


def test_a_checkpoint_to_a_file_and_back_is_the_same_to_the_bit(folder: str, desk: Desk) -> None:
    desk.out = desk.folder / "deep" / "out.safetensors"
    assert "step 4" in desk.run("--from", "flame", folder)
    assert_same(load_safetensors(desk.out), own())
    file, desk.out = str(desk.out), desk.folder / "back"
    desk.run("--from", "flame", file, *desk.config())
    assert_same(load_checkpoint(desk.out), own())


def test_a_configuration_that_is_given_must_fit(folder: str, desk: Desk) -> None:
    assert "model.layers" in desk.refusal("--from", "flame", folder, *desk.config(), "--model.layers=3")
    assert "schema.tasks" in desk.refusal(
        "--from", "flame", folder, *desk.config(schema=dataclasses.replace(SCHEMA, tasks=("like",)))
    )


def test_choices_have_no_meaning_for_a_checkpoint(folder: str, desk: Desk) -> None:
    said = desk.refusal("--from", "flame", folder, "--fresh", "head/*", "--no-unknown-row")
    assert "leave out --no-unknown-row, --fresh" in said


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("item", np.full((ROWS, 12), np.nan, np.float32), "item"),
        ("item", np.zeros((ROWS - 1, 12), np.float32), "item is (7, 12), expected (8, 12)"),
        ("stray", np.zeros(3, np.float32), "extra stray"),
    ],
    ids=["not finite", "misshapen", "extra"],
)
def test_a_checkpoint_that_is_not_whole_is_refused(name: str, value: Any, said: str, desk: Desk) -> None:
    save_safetensors(dataclasses.replace(own(), weights=ours() | {name: value}), desk.folder / "a.safetensors")
    assert said in desk.refusal("--from", "flame", str(desk.folder / "a.safetensors"))


def test_the_description_is_plain_json(folder: str, desk: Desk) -> None:
    desk.out = desk.folder / "out.safetensors"
    desk.run("--from", "flame", folder)
    with safetensors.safe_open(desk.out, framework="numpy") as file:
        about = json.loads(file.metadata()["flame_jax"])
        assert file.get_tensor("layers/uvqk_w").shape == ours()["layers/uvqk_w"].shape
    assert (about["step"], about["model"]["name"]) == (4, "brought")


@pytest.mark.parametrize("name", ["x.npz", "x.pt"])
def test_a_file_that_is_not_written_is_not_named_as_if_it_were(name: str, desk: Desk) -> None:
    desk.out = desk.folder / name
    assert "a folder, or a file that ends with .safetensors" in desk.refusal(*desk.meta(theirs()))
