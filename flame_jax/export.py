"""`python -m flame_jax.export COMMAND`: build, inspect, verify, sign and tune artifacts; plan their ladder."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

# XLA logs a line per kernel that a tuning file lacks; what is missing is told by `tuning` in the manifest.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
from tqdm import tqdm

from flame_jax.commandline import load, refuse
from flame_jax.config import Config
from flame_jax.fke.artifact import Artifact, ArtifactError
from flame_jax.fke.build import Builder, build, rebuild
from flame_jax.fke.device import described_device, described_devices, platform_of, target_of
from flame_jax.fke.manifest import Manifest, portable_name
from flame_jax.fke.report import columns, describe, table
from flame_jax.fke.signing import SigningKey, TrustedKeys, write_key_pair
from flame_jax.fke.tuning import Tuning
from flame_jax.fke.verify import verify
from flame_jax.fke.writer import sign_artifact
from flame_jax.models.checkpoint import CheckpointError, load_checkpoint
from flame_jax.plan import main as plan

PROG = "python -m flame_jax.export"
SHORT = {
    "--checkpoint": "--train.checkpoint",
    "--out": "--export.artifact",
    "--platform": "--export.platform",
    "--device-kind": "--export.device_kind",
    "--tuned": "--export.tuned",
    "--key": "--export.signing_key",
    "--jobs": "--export.jobs",
}
"""Settings of `build` that have a short name."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; ends with status 1 and one line when it fails, 2 when it was called wrongly."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] not in COMMANDS:
        shown = "\n".join(f"  {name:8} {command.__doc__}" for name, command in COMMANDS.items())
        if args[:1] in (["-h"], ["--help"]):
            print(f"usage: {PROG} COMMAND ...\n\n{shown}")
            raise SystemExit(0)
        refuse(PROG, f"name a command: {', '.join(COMMANDS)}; --help says what each does")
    try:
        COMMANDS[args[0]](args[1:])
    except (ArtifactError, CheckpointError, ValueError, OSError) as error:
        refuse(PROG, str(error), status=1)


def _build(args: list[str]) -> None:
    """make an artifact of a checkpoint, or of another artifact (--from) for another machine"""
    prog = f"{PROG} build"
    source = _take(args, "--from", prog)
    config = load([_long(a) for a in args], prog=prog, about=_build_help())
    if source is not None:
        # The configuration's place is the source's more often than not, so it has to be said.
        if not any(a.partition("=")[0] in ("--out", "--export.artifact") for a in args):
            refuse(prog, "--from needs --out DIR")
        manifest = rebuild(Artifact(source), Path(config.export.artifact), make_builder(config))
    else:
        manifest = export(config, make_builder(config))
    print(f"wrote {config.export.artifact}: {_title(manifest)}")
    if untuned := [str(e.bucket) for e in manifest.executables if e.tuning in ("none", "partial")]:
        print(
            f"buckets {', '.join(untuned)} hold kernels chosen without measuring: run `export tune` on the device, "
            "then build --tuned FILE",
            file=sys.stderr,
        )


def _build_help() -> str:
    short = "\n".join(f"  {name} is {full}" for name, full in SHORT.items())
    return (
        "Make an artifact of a checkpoint (--checkpoint), or compile another artifact's portable programs (--from DIR)."
        f"\n{short}\nDevices that need not be here: {', '.join(described_devices())}."
    )


def _inspect(args: list[str]) -> None:
    """print what an artifact holds; --json for machines"""
    parser = _parser("inspect", "Print what an artifact says of itself; nothing but its manifest is read.")
    parser.add_argument("artifact", metavar="DIR")
    parser.add_argument("--json", action="store_true")
    parsed = parser.parse_args(args)
    about = describe(Artifact(parsed.artifact))
    print(json.dumps(about, indent=1) if parsed.json else table(about))


def _verify(args: list[str]) -> None:
    """check everything that a server would, and that scores are invariant"""
    parser = _parser("verify", "Check every file, load, replay the golden requests alone, beside others, at offsets.")
    parser.add_argument("artifact", metavar="DIR")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--trusted-key", action="append", metavar="FILE", help="public key that must have signed it")
    parsed = parser.parse_args(args)
    artifact = Artifact(parsed.artifact, TrustedKeys(parsed.trusted_key) if parsed.trusted_key else None)
    reports, tolerance = verify(artifact, jax.devices()[0]), artifact.manifest.golden_tolerance
    failed = [str(r.bucket) for r in reports if not r.passes(tolerance)]
    if parsed.json:
        print(
            json.dumps({"tolerance": tolerance, "failed": failed, "buckets": [r.to_json() for r in reports]}, indent=1)
        )
    else:
        rows: list[tuple[str, ...]] = [
            (
                str(r.bucket),
                str(r.requests),
                str(r.placements),
                f"{r.golden:.2g}",
                "0 (equal bits)" if r.moved == 0 else f"{r.moved:.2g}",
                "yes" if r.recompiled else "no",
            )
            for r in reports
        ]
        titles = ("bucket", "requests", "placements", "off golden", "moved by placement", "recompiled")
        print("\n".join([f"{artifact.path}: {_title(artifact.manifest)}", *columns(titles, rows)]))
    if failed:
        refuse(PROG, f"buckets {', '.join(failed)} are beyond the tolerance of {tolerance:g}", status=1)
    if not parsed.json:
        print(f"good: every file whole, every score within {tolerance:g}")


def _tune(args: list[str]) -> None:
    """measure XLA's choices of GPU kernels on this machine's device, for builds without one"""
    parser = _parser("tune", "Compile an artifact's portable programs here and keep what XLA measured of its kernels.")
    parser.add_argument("artifact", metavar="DIR", help="built for any machine")
    parser.add_argument("--out", required=True, metavar="FILE", help="takes the choices, for `build --tuned FILE`")
    parsed = parser.parse_args(args)
    artifact, device = Artifact(parsed.artifact), jax.devices()[0]
    if platform_of(device) != "cuda":
        refuse(PROG, f"tuning needs a CUDA device, this machine has {device.device_kind}", status=1)
    buckets = tqdm(artifact.manifest.buckets, desc="tune", unit="bucket")
    tuning = Tuning.measure((artifact.read(portable_name(bucket)) for bucket in buckets), device)
    tuning.save(Path(parsed.out))
    print(f"wrote {parsed.out}: choices for {tuning.target.device_kind}, {tuning.target.plugin}")


def _plan(args: list[str]) -> None:
    """propose a bucket ladder for a sample of traffic"""
    plan(args)


def _keygen(args: list[str]) -> None:
    """make a pair of Ed25519 keys to sign artifacts with"""
    parser = _parser("keygen", "Write a private key and, beside it, the public one for server.trusted_keys.")
    parser.add_argument("file", metavar="FILE")
    parsed = parser.parse_args(args)
    print(f"wrote {parsed.file} (keep it secret) and {write_key_pair(Path(parsed.file))}")


def _sign(args: list[str]) -> None:
    """sign an artifact's manifest, which names the hash of every other file"""
    parser = _parser("sign", "Check every file of an artifact, then sign its manifest.")
    parser.add_argument("artifact", metavar="DIR")
    parser.add_argument("--key", required=True, metavar="FILE", help="private key of `keygen`")
    parsed = parser.parse_args(args)
    sign_artifact(Path(parsed.artifact), SigningKey(Path(parsed.key)))
    print(f"signed {parsed.artifact}")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "build": _build,
    "inspect": _inspect,
    "verify": _verify,
    "plan": _plan,
    "tune": _tune,
    "keygen": _keygen,
    "sign": _sign,
}


def export(config: Config, builder: Builder) -> Manifest:
    """Build the artifact of the configuration's checkpoint.

    Raises:
        CheckpointError: there is none, or it is of another model.
        ArtifactError, ValueError, OSError: see `fke.build.build`.
    """
    checkpoint = load_checkpoint(config.train.checkpoint)
    checkpoint.check_fits(config.model, config.schema, config.train.checkpoint)
    return build(config, replace(checkpoint, model=config.model), builder)


def make_builder(config: Config) -> Builder:
    """What the configuration's `export` section asks for. Raises ValueError where it can't be had."""
    settings = config.export
    device = _device(settings.platform, settings.device_kind)
    return Builder(
        device,
        jobs=settings.jobs,
        tuning=Tuning.load(Path(settings.tuned), target_of(device)) if settings.tuned else None,
        key=SigningKey(Path(settings.signing_key)) if settings.signing_key else None,
    )


def _device(platform: str, kind: str) -> jax.Device:
    """A device of this machine, or one that is only described."""
    if kind:
        if platform == "cpu":
            raise ValueError("export.device_kind names a CUDA device, export.platform is cpu")
        return described_device(kind)
    if not platform:
        return jax.devices()[0]
    try:
        return jax.local_devices(backend=platform)[0]
    except RuntimeError:
        raise ValueError(
            f"this machine has no {platform} device; compile for one that is not here with --device-kind "
            f"{'|'.join(described_devices())}"
            if platform == "cuda"
            else f"JAX runs on no {platform} here; see JAX_PLATFORMS"
        ) from None


def _parser(command: str, about: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"{PROG} {command}", description=about, allow_abbrev=False)


def _take(args: list[str], flag: str, prog: str) -> str | None:
    """Remove a flag that is no setting, with its value, and return the value."""
    for at, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name != flag:
            continue
        if equals:
            del args[at]
        elif at + 1 < len(args):
            value = args.pop(at + 1)
            del args[at]
        if not value:
            refuse(prog, f"{flag} has no value")
        return value
    return None


def _long(arg: str) -> str:
    name, equals, value = arg.partition("=")
    return SHORT.get(name, name) + equals + value


def _title(manifest: Manifest) -> str:
    target = manifest.target
    return (
        f"model {manifest.model.name} version {manifest.version}, {len(manifest.buckets)} buckets for "
        f"{target.platform} ({target.device_kind})"
    )


if __name__ == "__main__":
    main()
