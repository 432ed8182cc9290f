"""`python -m flame_jax.export COMMAND`: build, inspect, verify, sign and tune artifacts; plan their ladder."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

# XLA logs a line per kernel that a tuning file lacks; what is missing is told by `tuning` in the manifest.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
from tqdm import tqdm

from flame_jax.commandline import load, refuse
from flame_jax.config import Config, ExportConfig
from flame_jax.fke.artifact import Artifact, ArtifactError
from flame_jax.fke.build import Builder, build, rebuild
from flame_jax.fke.compile import PLATFORMS
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
TRUSTED_KEY = "public key whose holder must have signed it; may be given more than once"


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
    except KeyboardInterrupt:
        refuse(PROG, "interrupted; nothing was written", status=130)


def _build(args: list[str]) -> None:
    """make an artifact of a checkpoint, or of another artifact (--from) for another machine"""
    if any(arg.partition("=")[0] == "--from" for arg in args):
        _rebuild(args)
        return
    config = load([_long(a) for a in args], prog=f"{PROG} build", about=_build_help())
    _say_built(config.export.artifact, export(config, make_builder(config.export)))


def _rebuild(args: list[str]) -> None:
    """Everything but the target is the other artifact's, so no configuration is read."""
    parser = _parser("build", "Compile another artifact's portable programs; all else is taken over.")
    parser.add_argument("--from", dest="source", required=True, metavar="DIR")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--platform", choices=PLATFORMS, default="")
    for name in ("--device-kind", "--tuned", "--key"):
        parser.add_argument(name, default="")
    parser.add_argument("--jobs", type=int, default=0)
    parser.add_argument("--trusted-key", action="append", metavar="FILE", help=TRUSTED_KEY)
    parsed = parser.parse_args(args)
    source = Artifact(parsed.source, _trusted(parsed.trusted_key))
    if source.signed and parsed.key and not parsed.trusted_key:
        parser.error("the source is signed: name its --trusted-key, or --key would vouch for what nobody has checked")
    settings = ExportConfig(
        platform=parsed.platform,
        device_kind=parsed.device_kind,
        tuned=parsed.tuned,
        signing_key=parsed.key,
        jobs=parsed.jobs,
    )
    _say_built(parsed.out, rebuild(source, Path(parsed.out), make_builder(settings)))
    if source.signed and not parsed.key:
        print(f"{parsed.out} is not signed, its source was: sign it with --key, or `export sign`", file=sys.stderr)


def _say_built(path: str, manifest: Manifest) -> None:
    print(f"wrote {path}: {_title(manifest)}")
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
    parser.add_argument("--trusted-key", action="append", metavar="FILE", help=TRUSTED_KEY)
    parsed = parser.parse_args(args)
    artifact = Artifact(parsed.artifact, _trusted(parsed.trusted_key))
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
                "-" if not r.compared else "0 (equal bits)" if r.moved == 0 else f"{r.moved:.2g}",
                "yes" if r.recompiled else "no",
            )
            for r in reports
        ]
        titles = ("bucket", "requests", "placements", "off golden", "moved by placement", "recompiled")
        print("\n".join([f"{artifact.path}: {_title(artifact.manifest)}", *columns(titles, rows)]))
    if failed:
        refuse(PROG, f"buckets {', '.join(failed)} are beyond the tolerance of {tolerance:g}", status=1)
    if not parsed.json:
        print(f"good: every file whole, every score within {tolerance:g} of the golden set's spread")


def _tune(args: list[str]) -> None:
    """measure XLA's choices of GPU kernels on this machine's device, for builds without one"""
    parser = _parser("tune", "Compile an artifact's portable programs here and keep what XLA measured of its kernels.")
    parser.add_argument("artifact", metavar="DIR", help="built for any machine")
    parser.add_argument("--out", required=True, metavar="FILE", help="takes the choices, for `build --tuned FILE`")
    parsed = parser.parse_args(args)
    artifact, device = Artifact(parsed.artifact), jax.devices()[0]
    if not os.access(Path(parsed.out).parent, os.W_OK):
        refuse(PROG, f"{parsed.out} can't be written there", status=1)
    if platform_of(device) != "cuda":
        refuse(PROG, f"tuning needs a CUDA device, this machine has {device.device_kind}", status=1)
    buckets = tqdm(artifact.manifest.buckets, desc="tune", unit="bucket", disable=None)
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


def make_builder(settings: ExportConfig) -> Builder:
    """What an `export` section asks for. Raises ValueError where it can't be had."""
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        refuse(self.prog, message)


def _parser(command: str, about: str) -> argparse.ArgumentParser:
    return _Parser(prog=f"{PROG} {command}", description=about, allow_abbrev=False)


def _trusted(files: list[str] | None) -> TrustedKeys | None:
    return TrustedKeys(files) if files else None


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
