"""URLs of stores: what may be in them, and what of them may be said."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

_TLS = {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile"}
SCHEMES = {"redis": {"db"}, "rediss": {"db", *_TLS}, "unix": {"db"}}
"""Of a store's URL, and what its query may hold: anything else would change how the client works."""


def redacted(url: str) -> str:
    """A store's URL as it may be logged: without user, password and options, and nothing of what is none."""
    if not url:
        return ""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port is not None else ""
    except ValueError:
        return "(hidden)"
    if parts.scheme not in SCHEMES:
        return "(hidden)"
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path}"


def misfit(url: str) -> str:
    """Why this is no URL of a store; empty where it is one. Says nothing of what it holds, which may be a password."""
    try:
        parts = urlsplit(url)
        known = SCHEMES.get(parts.scheme)
        given = parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        _ = parts.port
    except ValueError:
        return "it is no URL; a password's /, ?, # and @ are written %2F, %3F, %23 and %40"
    if known is None:
        return f"it begins with none of {', '.join(f'{scheme}://' for scheme in SCHEMES)}"
    if unknown := sorted(set(given) - known):
        return f"its query has options beside {', '.join(sorted(known))}: {len(unknown)}"
    databases = given.get("db", [])
    if parts.scheme == "unix":
        if not parts.path:
            return "it names no socket"
    elif named := parts.path.strip("/"):
        databases = [*databases, named]
    return "" if all(name.isdecimal() for name in databases) else "its database is no number"
