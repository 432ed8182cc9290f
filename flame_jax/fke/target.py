"""What executables are built for, and whether they run here. No JAX."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Target:
    """What executables were built for; the machine that serves them must match it.

    Attributes:
        platform: `cpu` or `cuda`, JAX's word for the maker's software; other platforms are as JAX names them.
        device_kind: JAX's name of the device.
        compute_capability: of a CUDA device, `9.0` for an H100; empty elsewhere.
        jaxlib: version.
        plugin: the PJRT plugin's distribution and version; empty on the CPU, which jaxlib itself runs.
        cpu_features: flags of the CPU that was built on, of an executable for the CPU.
    """

    platform: str
    device_kind: str
    compute_capability: str
    jaxlib: str
    plugin: str
    cpu_features: tuple[str, ...] = ()

    def misfit(self, here: Target) -> str | None:
        """Why executables for this target can't run `here`, as `built for X 'a', this process has 'b'`."""
        for name in ("platform", "compute_capability", "jaxlib", "plugin"):
            built, present = asdict(self)[name], asdict(here)[name]
            if built != present:
                return f"was built for {name.replace('_', ' ')} {built!r}, this process has {present!r}"
        return None

    def missing_features(self, here: Target) -> list[str]:
        """Flags of the CPU that was built on which the one `here` lacks: executables may use what they stand for."""
        return sorted(set(self.cpu_features) - set(here.cpu_features))
