"""`python -m flame_jax.demo --config FILE [--keep]`: start the server, rank real users, stop it."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence

from flame_jax.commandline import load

PROG = "python -m flame_jax.demo"
USERS = ("42", "7", "405")


def main(argv: Sequence[str] | None = None) -> None:
    """Exit with the first status that is not 0."""
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="configuration that was trained and exported")
    parser.add_argument("--keep", action="store_true", help="leave the server up, on its configured ports")
    args = parser.parse_args(argv)
    config = load(["--config", args.config], prog=PROG)
    command = [sys.executable, "-m", "flame_jax.server", "--config", args.config, "--server.log_level", "WARNING"]
    if not args.keep:
        command += ["--server.port", "0", "--server.metrics_port", "0"]
    for number in (signal.SIGTERM, signal.SIGINT):  # SIGINT too: a shell's background job starts with it ignored
        signal.signal(number, signal.default_int_handler)
    # A session of its own: Ctrl-C reaches this process, which then asks the server to drain, once.
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        target = wait_ready(server)
        for user in USERS:
            print(flush=True)
            rank = [sys.executable, "-m", "flame_jax.client", "rank", "--target", target, "--user", user]
            subprocess.run([*rank, "--store", config.store.path, "--top", "10"], check=True)
        if args.keep:
            print(f"\nserving on {target}; stop with Ctrl-C", flush=True)
            server.wait()
    except KeyboardInterrupt:
        print(flush=True)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    finally:
        if server.poll() is None:
            server.terminate()
            server.wait()
    sys.exit(server.returncode)


def wait_ready(server: subprocess.Popen[str]) -> str:
    """Pass the ready line on and return its HOST:PORT. Exits with the server's status if it ends first."""
    assert server.stdout is not None
    for line in server.stdout:
        print(line, end="", flush=True)
        if line.startswith("READY "):
            return dict(part.split("=", 1) for part in line.split()[1:])["grpc"]
    sys.exit(server.wait() or 1)


if __name__ == "__main__":
    main()
