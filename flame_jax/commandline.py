"""The one way a configuration is filled in, and the one way a program ends with an error.

Precedence: defaults < environment `FLAME_SECTION__FIELD` < YAML (`--config FILE`, first) < flags.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from flame_jax.config import Config

ENV_PREFIX = "FLAME"


def load(argv: Sequence[str] | None = None, *, prog: str, about: str | None = None) -> Config:
    """Resolve the configuration of one program from environment, file and flags.

    Ends the process with status 2 and one line naming the field when a key is unknown or a value is wrong,
    when `--config` is not the first argument, or when a `FLAME_SECTION__FIELD` variable names no field.

    Args:
        about: what `--help` says of the program.
    """
    import jsonargparse

    args = list(sys.argv[1:] if argv is None else argv)
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        description=about,
        env_prefix=ENV_PREFIX,
        default_env=True,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; must be the first argument")
    parser.add_class_arguments(Config)
    if any(a == "--config" or a.startswith("--config=") for a in args[1:]):
        refuse(prog, "--config must be the first argument: the file would override the flags before it")
    for flag in args:
        if flag.startswith("--") and flag[2:].split("=")[0] in Config.__dataclass_fields__:
            refuse(prog, f"{flag} takes no value: name one of its fields, or use --config")
    for name in Config.__dataclass_fields__:
        if f"{ENV_PREFIX}_{name.upper()}" in os.environ:
            refuse(prog, f"{ENV_PREFIX}_{name.upper()} names a section: set its fields, or use --config")
    known = {f"{ENV_PREFIX}_{name.replace('.', '__').upper()}" for name in parser.get_defaults().keys(branches=True)}
    for name in sorted(os.environ):
        if name.startswith(f"{ENV_PREFIX}_") and "__" in name and name not in known:
            refuse(prog, f"environment variable {name} names no setting")
    if f"{ENV_PREFIX}_CONFIG" in os.environ:
        refuse(prog, f"name the file with --config, not with {ENV_PREFIX}_CONFIG: it would lose to other variables")
    try:
        parsed = parser.parse_args(args)
        for name, value in parsed.items():
            if name in Config.__dataclass_fields__:
                refuse(prog, f"{name} must be a mapping, not {value!r}")
            if value is None and name != "config":
                refuse(prog, f"{name} has no value")
        init = parser.instantiate(parsed)
        return Config(**{name: getattr(init, name) for name in Config.__dataclass_fields__})
    except (jsonargparse.ArgumentError, ValueError) as error:
        refuse(prog, str(error))


def refuse(prog: str, reason: str, status: int = 2) -> NoReturn:
    """End the process with one clear line on stderr."""
    print(f"{prog}: error: {' '.join(reason.split())}", file=sys.stderr)
    raise SystemExit(status)
