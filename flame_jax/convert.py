"""`python -m flame_jax.convert --from FORMAT SRC --config FILE --out CKPT`: other people's weights to a checkpoint."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

import numpy as np

from flame_jax.commandline import load, refuse
from flame_jax.config import Config
from flame_jax.models.checkpoint import Checkpoint, CheckpointError, CheckpointFolder, load_checkpoint
from flame_jax.models.interchange import SUFFIX, is_checkpoint_file, load_safetensors, save_safetensors
from flame_jax.models.meta_stu import META_STU
from flame_jax.models.placement import ITEMS, Choices, Placed, ReadStack, not_finite, place
from flame_jax.models.public_layers import Layers, PublicStack, Sizes
from flame_jax.models.recsys_examples import RECSYS_EXAMPLES, heads_inside
from flame_jax.models.serving import abstract_model, check_weights, weight_specs
from flame_jax.models.tensors import READERS, TensorError, read_tensors

PROG = "python -m flame_jax.convert"

PUBLIC: dict[str, tuple[str, PublicStack]] = {
    "meta-stu": ("dlrm_v3", META_STU),
    "recsys-examples": ("recsys_examples", RECSYS_EXAMPLES),
}
"""Source format -> the HSTU variant that it is, and how its layers are named."""


def main(argv: Sequence[str] | None = None) -> None:
    """Convert, and print what became of every tensor; nothing is written unless all of them fit."""
    settings, own = split_settings(list(sys.argv[1:] if argv is None else argv))
    args = parse(own)
    config = load(["--config", args.config, *settings] if args.config else settings, prog=PROG)
    try:
        if Path(args.out).suffix in set(READERS) - {SUFFIX}:
            raise CheckpointError(f"{args.out}: what is written is a folder, or a file that ends with {SUFFIX}")
        if os.path.lexists(args.out):
            raise CheckpointError(f"{args.out} exists and is left alone: name another place")
        checkpoint, said = convert(args, config if args.config or settings else None)
        save(checkpoint, args.out)
    except (CheckpointError, TensorError, ValueError, OSError) as error:
        refuse(PROG, str(error), status=1)
    print(f"wrote {args.out}: model {checkpoint.model.name}, step {checkpoint.step}, {said}")


def split_settings(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags `--section.field value` of the configuration, and all other arguments.

    argparse would take the value of a flag that it doesn't know for SRC.
    """
    sections = tuple(f"--{section.name}." for section in fields(Config))
    settings: list[str] = []
    own: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith(sections):
            own.append(argument)
            continue
        settings.append(argument)
        if "=" not in argument:
            settings += [value for value in [next(arguments, None)] if value is not None]
    return settings, own


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        refuse(self.prog, message)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read this program's own arguments; ends the process with status 2 and one line when they are wrong."""
    parser = _Parser(
        prog=PROG,
        allow_abbrev=False,
        description="Make a checkpoint of other people's weights, or turn one into a safetensors file and back.",
        epilog="Flags --section.field change the configuration, as for every program.",
    )
    add = parser.add_argument
    add("source", metavar="SRC", help="tensors (.safetensors, .npz, .pt, .pth, .bin), or a checkpoint of ours")
    add("--from", dest="format", required=True, choices=[*PUBLIC, "flame"], help="whose names they have")
    add("--config", metavar="FILE", help="YAML file; not needed for a checkpoint of ours")
    add("--out", required=True, metavar="PATH", help="a new checkpoint folder, or a new file X.safetensors")
    add(
        "--vocabulary",
        action="append",
        default=[],
        metavar="[FEATURE=]FILE.npy",
        help="int64 item ids in the order of the item table's rows, or the keys of an id feature, as item.brand",
    )
    add("--no-unknown-row", action="store_true", help="SRC's tables of ids have no out-of-vocabulary row 0")
    add("--rename", action="append", default=[], metavar="OURS=THEIRS", help="our weight's name in SRC")
    add("--fresh", action="append", default=[], metavar="GLOB", help="our weights that keep their initial value")
    add("--ignore", action="append", default=[], metavar="GLOB", help="SRC's tensors that are left out")
    add("--heads-outermost", action="store_true", help="recsys-examples' earlier layer: columns lie head by head")
    args = parser.parse_args(argv)
    renames = [text.partition("=") for text in args.rename]
    args.rename = {ours: theirs for ours, _, theirs in renames}
    if not all(ours and theirs for ours, theirs in args.rename.items()) or len(args.rename) != len(renames):
        parser.error("--rename takes OURS=THEIRS, once for each of ours")
    # A path may hold an "=" too.
    vocabularies = [
        re.fullmatch(r"(?:((?:item|user|context)\.\w+)=)?(.*)", text, re.DOTALL) for text in args.vocabulary
    ]
    args.vocabulary = {match[1] or ITEMS: match[2] for match in vocabularies if match}
    if len(args.vocabulary) != len(vocabularies) or not all(args.vocabulary.values()):
        parser.error("--vocabulary takes a file, once for the items and once for each id feature")
    if args.heads_outermost and args.format != "recsys-examples":
        parser.error("--heads-outermost is for --from recsys-examples only")
    return args


def convert(args: argparse.Namespace, config: Config | None) -> tuple[Checkpoint, str]:
    """The checkpoint that SRC becomes, and what to say of it.

    Args:
        config: None when nothing of it was given.

    Raises:
        CheckpointError, TensorError, ValueError: one clear line.
    """
    if not Path(args.source).exists():
        raise TensorError(f"there is nothing at {args.source}")
    if args.format == "flame" and (Path(args.source).is_dir() or is_checkpoint_file(args.source)):
        checkpoint = own_checkpoint(args, config)
        return checkpoint, f"{len(checkpoint.weights)} weights as they were"
    if config is None or not args.config:
        raise CheckpointError(f"{args.source} does not say what model it is of: name a configuration with --config")
    read_stack = stack_reader(args, config)
    placed = place(
        read_tensors(args.source),
        config.model,
        config.schema,
        Choices(args.rename, args.fresh, args.ignore, not args.no_unknown_row),
        seed=config.train.seed,
        ids={feature: read_ids(path) for feature, path in args.vocabulary.items()},
        read_stack=read_stack,
    )
    checkpoint = Checkpoint(0, config.model, config.schema, placed.vocabularies, placed.weights, [])
    return checkpoint, describe(placed)


def own_checkpoint(args: argparse.Namespace, config: Config | None) -> Checkpoint:
    """A checkpoint of ours, folder or file. Raises CheckpointError or ValueError when it is not whole."""
    choices = {
        "--vocabulary": args.vocabulary,
        "--no-unknown-row": args.no_unknown_row,
        "--rename": args.rename,
        "--fresh": args.fresh,
        "--ignore": args.ignore,
    }
    if given := [option for option, value in choices.items() if value]:
        raise CheckpointError(f"{args.source} is a checkpoint and is taken as it is: leave out {', '.join(given)}")
    folder = Path(args.source).is_dir()
    checkpoint = load_checkpoint(args.source) if folder else load_safetensors(args.source)
    if config is not None:
        checkpoint.check_fits(config.model, config.schema, args.source)
    model = abstract_model(checkpoint.model, checkpoint.schema, checkpoint.vocabularies.items.rows)
    check_weights(weight_specs(model), checkpoint.weights)
    if bad := not_finite(checkpoint.weights):
        raise CheckpointError(f"checkpoint {args.source} has weights that are not finite everywhere: {', '.join(bad)}")
    return checkpoint


def stack_reader(args: argparse.Namespace, config: Config) -> ReadStack | None:
    """What reads the layers of a public format. Raises ValueError when the configured model has other layers."""
    if args.format not in PUBLIC:
        return None
    variant, stack = PUBLIC[args.format]
    model = config.model
    asked = f"hstu, variant {model.hstu.variant}" if model.architecture == "hstu" else model.architecture
    if asked != f"hstu, variant {variant}":
        raise ValueError(
            f"--from {args.format} has layers of hstu, variant {variant}; the configuration asks for {asked}"
        )
    sizes = Sizes(model.heads, model.head_dim, model.hstu.value_dim)

    def read(tensors: Mapping[str, np.ndarray], skip: Collection[str]) -> Layers:
        layers = stack.read(tensors, sizes, model.width, skip)
        return layers._replace(weights=heads_inside(layers.weights, sizes)) if args.heads_outermost else layers

    return read


def read_ids(path: str) -> np.ndarray:
    """The int64 ids of a .npy file, in its order. Raises ValueError for anything else."""
    try:
        ids = np.load(path, allow_pickle=False)
    except Exception as error:  # NumPy raises half a dozen kinds on damaged bytes
        raise ValueError(f"vocabulary {path} can't be read as .npy: {error}") from error
    if not isinstance(ids, np.ndarray) or ids.dtype != np.int64:
        raise ValueError(f"vocabulary {path} does not hold int64 ids")
    return ids


def save(checkpoint: Checkpoint, path: str) -> None:
    """Write a checkpoint to a place where nothing is yet."""
    if path.endswith(SUFFIX):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_safetensors(checkpoint, path)
        return
    with CheckpointFolder(path) as folder:
        folder.save(checkpoint)


def describe(placed: Placed) -> str:
    """What became of weights and tensors."""
    brought = len(placed.weights) - len(placed.fresh)
    parts = [f"{len(placed.weights)} weights, {brought} of them from SRC, {len(placed.vocabularies.items.keys)} items"]
    for title, names in (("fresh", placed.fresh), ("ignored", placed.ignored)):
        parts.append(f"{title}: {', '.join(names) or 'none'}")
    return "; ".join(parts)


if __name__ == "__main__":
    main()
