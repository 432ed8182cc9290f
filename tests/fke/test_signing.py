"""Signatures: made by one key, checked against those trusted, and the same as another program's."""

from __future__ import annotations

import shutil
import stat
import subprocess
from base64 import b64decode
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from flame_jax.fke.artifact import Artifact, ArtifactError
from flame_jax.fke.manifest import MANIFEST, SIGNATURE
from flame_jax.fke.signing import KeyFileError, SigningKey, TrustedKeys, write_key_pair
from flame_jax.fke.writer import sign_artifact, write_artifact
from tests import tiny


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """Two private keys; the public ones lie beside them."""
    one, two = tmp_path / "one.key", tmp_path / "two.key"
    for key in (one, two):
        assert write_key_pair(key) == key.with_name(key.name + ".pub")
    return one, two


def trusted(*keys: Path) -> TrustedKeys:
    return TrustedKeys([key.with_name(key.name + ".pub") for key in keys])


def refusal(path: Path, keys: TrustedKeys) -> str:
    with pytest.raises(ArtifactError) as caught:
        Artifact(path, keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_private_key_is_its_owners_alone(keys: tuple[Path, Path]) -> None:
    assert stat.S_IMODE(keys[0].stat().st_mode) == 0o600


def test_a_signed_artifact_is_told_from_others(keys: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = keys
    path = tmp_path / "artifact"
    tiny.save_artifact(path)
    assert not Artifact(path).signed
    assert "is not signed" in refusal(path, trusted(one))
    sign_artifact(path, SigningKey(one))
    assert Artifact(path).signed
    Artifact(path, trusted(one))
    Artifact(path, trusted(two, one))
    assert "not signed by the holder" in refusal(path, trusted(two))
    sign_artifact(path, SigningKey(two))
    Artifact(path, trusted(two))
    assert "not signed by the holder" in refusal(path, trusted(one))


def test_an_artifact_can_be_written_signed(keys: tuple[Path, Path], tmp_path: Path) -> None:
    manifest, files = tiny.built()
    write_artifact(tmp_path / "artifact", manifest, files, key=SigningKey(keys[0]))
    Artifact(tmp_path / "artifact", trusted(keys[0]))


def test_no_trusted_key_trusts_nobody(keys: tuple[Path, Path], tmp_path: Path) -> None:
    tiny.save_artifact(tmp_path / "artifact")
    sign_artifact(tmp_path / "artifact", SigningKey(keys[0]))
    assert "not signed by" in refusal(tmp_path / "artifact", TrustedKeys([]))


@pytest.mark.parametrize("change", ["manifest", "signature", "shorter", "empty", "not base64", "another artifact's"])
def test_a_signature_covers_every_byte_of_the_manifest(change: str, keys: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    tiny.save_artifact(path)
    sign_artifact(path, SigningKey(keys[0]))
    manifest, signature = path / MANIFEST, path / SIGNATURE
    if change == "manifest":
        manifest.write_bytes(manifest.read_bytes().replace(b'"version": "7"', b'"version": "8"'))
    elif change == "signature":
        text = signature.read_bytes()
        signature.write_bytes((b"A" if text[:1] != b"A" else b"B") + text[1:])
    elif change == "another artifact's":
        tiny.save_artifact(tmp_path / "other", version="8")
        sign_artifact(tmp_path / "other", SigningKey(keys[0]))
        shutil.copy(tmp_path / "other" / SIGNATURE, signature)
    else:
        signature.write_bytes({"shorter": signature.read_bytes()[:40], "empty": b"", "not base64": b"\xff*"}[change])
    assert "not signed by" in refusal(path, trusted(keys[0]))


def test_a_damaged_artifact_is_not_signed(keys: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    tiny.save_artifact(path)
    data = bytearray((path / "weights.safetensors").read_bytes())
    data[100] ^= 1
    (path / "weights.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError, match="does not match its hash"):
        sign_artifact(path, SigningKey(keys[0]))
    assert not (path / SIGNATURE).exists()


def test_openssl_agrees(keys: tuple[Path, Path], tmp_path: Path) -> None:
    """An operator can check a signature, or make one, without this program."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    path = tmp_path / "artifact"
    tiny.save_artifact(path)
    sign_artifact(path, SigningKey(keys[0]))
    (tmp_path / "raw").write_bytes(b64decode((path / SIGNATURE).read_bytes()))
    command = ["openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", f"{keys[0]}.pub"]
    files = ["-in", str(path / MANIFEST), "-sigfile", str(tmp_path / "raw")]
    done = subprocess.run([*command, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def rsa(path: Path) -> Path:
    key = generate_private_key(65537, 2048)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    path.with_name(path.name + ".pub").write_bytes(public)
    return path


def test_key_files_of_other_kinds_are_refused_by_name(keys: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"junk")
    (tmp_path / "junk.pub").write_bytes(b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
    other = rsa(tmp_path / "rsa")
    for path in (tmp_path / "none", tmp_path / "junk", other, keys[0].with_name("one.key.pub")):
        with pytest.raises(KeyFileError, match=str(path)):
            SigningKey(path)
    for path in (tmp_path / "none", tmp_path / "junk.pub", Path(f"{other}.pub"), keys[0]):
        with pytest.raises(KeyFileError, match=str(path)):
            TrustedKeys([path])


def test_a_key_is_never_overwritten(keys: tuple[Path, Path]) -> None:
    before = keys[0].read_bytes()
    with pytest.raises(FileExistsError):
        write_key_pair(keys[0])
    assert keys[0].read_bytes() == before
