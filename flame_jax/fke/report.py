"""An artifact as a table for people, or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flame_jax.fke.artifact import Artifact
from flame_jax.fke.manifest import WEIGHTS, BuiltExecutable, executable_name, portable_name


def describe(artifact: Artifact) -> dict[str, Any]:
    """What `inspect --json` prints: the manifest's essentials, and per bucket its executable."""
    manifest = artifact.manifest

    def row(executable: BuiltExecutable) -> dict[str, Any]:
        bucket = executable.bucket
        return {
            "bucket": str(bucket),
            "tokens": bucket.tokens,
            "candidates": bucket.candidates,
            "kernels": manifest.kernels,
            "flops": executable.flops,
            "temp_bytes": executable.temp_bytes,
            "executable_bytes": manifest.files[executable_name(bucket)].bytes,
            "portable_bytes": manifest.files[portable_name(bucket)].bytes,
            "compile_seconds": executable.compile_seconds,
            "tuning": executable.tuning,
        }

    target = manifest.target
    return {
        "path": str(artifact.path),
        "model": manifest.model.name,
        "architecture": manifest.model.architecture,
        "version": manifest.version,
        "created": manifest.created,
        "sha256": artifact.digest,
        "signed": artifact.signed,
        "target": {
            "platform": target.platform,
            "device_kind": target.device_kind,
            "compute_capability": target.compute_capability,
            "jaxlib": target.jaxlib,
            "plugin": target.plugin,
        },
        "platforms": list(manifest.platforms),
        "versions": manifest.versions,
        "matmul_precision": manifest.matmul_precision,
        "dtype": manifest.model.dtype,
        "caches_history": manifest.model.caches_history,
        "golden_tolerance": manifest.golden_tolerance,
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "weights_bytes": manifest.files[WEIGHTS].bytes,
        "executables": [row(e) for e in manifest.executables],
    }


def table(about: dict[str, Any]) -> str:
    """`describe` as text."""
    target = about["target"]
    on = " ".join(filter(None, (target["platform"], target["device_kind"], target["compute_capability"])))
    made = " ".join(filter(None, (f"jaxlib {target['jaxlib']}", target["plugin"])))
    kind = f"{about['architecture']}, {about['dtype']}"
    head = [
        f"{about['path']}: model {about['model']} ({kind}) version {about['version']}",
        f"  built {about['created']} for {on}, {made}; portable programs for {', '.join(about['platforms'])}",
        f"  {_mib(about['bytes'])} MiB, of it weights {_mib(about['weights_bytes'])} MiB; "
        f"{'signed' if about['signed'] else 'not signed'}; manifest sha256 {about['sha256'][:16]}",
        "",
    ]
    titles = ("bucket", "kernels", "GFLOP", "temp MiB", "code KiB", "compile s", "tuning")
    rows = [
        (
            e["bucket"],
            " ".join(f"{op}={implementation}" for op, implementation in e["kernels"].items()),
            f"{e['flops'] / 1e9:.3g}",
            _mib(e["temp_bytes"]),
            f"{e['executable_bytes'] / 1024:.0f}",
            f"{e['compile_seconds']:.1f}",
            e["tuning"] or "-",
        )
        for e in about["executables"]
    ]
    return "\n".join(head + columns(titles, rows))


def columns(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table: what looks like a number is set to the right."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    right = [all(row[i][:1].isdigit() or row[i] == "-" for row in rows) for i in range(len(titles))]

    def line(cells: tuple[str, ...]) -> str:
        set_ = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)]
        return "  ".join(set_).rstrip()

    return [line(titles), *map(line, rows)]


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"
