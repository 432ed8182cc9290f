"""Who made an artifact: Ed25519 signatures over its manifest, which names the hash of every other file."""

from __future__ import annotations

import binascii
import errno
import os
from base64 import b64decode, b64encode
from collections.abc import Iterable
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)


class KeyFileError(ValueError):
    """A key file can't be used; the message is one clear line."""


def write_key_pair(private: Path) -> Path:
    """Make a key pair: the private key at `private`, readable by its owner only, the public one beside it (.pub).

    Returns:
        The public key's path.

    Raises:
        OSError: there is a file already, or none can be written.
    """
    key, public = Ed25519PrivateKey.generate(), private.with_name(private.name + ".pub")
    if public.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(public))
    with os.fdopen(os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with public.open("xb") as file:
        file.write(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return public


class SigningKey:
    """A private key from a PEM file. Raises KeyFileError."""

    def __init__(self, path: Path) -> None:
        try:
            key = load_pem_private_key(path.read_bytes(), password=None)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise KeyFileError(f"signing key {path} can't be read: {error}") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise KeyFileError(f"signing key {path} is no Ed25519 key")
        self._key = key

    def sign(self, data: bytes) -> bytes:
        """The signature of `data` as a signature file's content: base64 and a newline."""
        return b64encode(self._key.sign(data)) + b"\n"


class TrustedKeys:
    """Public keys, PEM, whose holders' artifacts are served. Raises KeyFileError."""

    def __init__(self, paths: Iterable[str | Path]) -> None:
        self._keys = {str(path): _public(Path(path)) for path in paths}

    def signer(self, data: bytes, signature: bytes) -> str | None:
        """The file of the key whose holder signed `data`, None where there is no such key."""
        try:
            raw = b64decode(signature.strip(), validate=True)
        except binascii.Error:
            return None
        for path, key in self._keys.items():
            try:
                key.verify(raw, data)
            except InvalidSignature:
                continue
            return path
        return None


def _public(path: Path) -> Ed25519PublicKey:
    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise KeyFileError(f"trusted key {path} can't be read: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise KeyFileError(f"trusted key {path} is no Ed25519 public key")
    return key
