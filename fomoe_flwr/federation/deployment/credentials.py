"""Credentials of a federation: its certificate authority, server certificate and node keys.

    ca.crt  ca.key            the authority; all hosts trust ca.crt, ca.key stays at home
    server.crt  server.key    the SuperLink's certificate, valid for the names it is reached by
    NAME  NAME.pub            a SuperNode's key pair (ECDSA P-384, OpenSSH), one each
    superexec.secret          what a SuperExec proves itself with to the SuperLink

Private files are made readable to their owner alone, and none is ever overwritten.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fomoe_flwr.errors import InputError, refusal

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1", "superlink")
"""Names of a SuperLink on its own machine; the last is its name in deploy/compose."""

_CLOCK_SKEW = timedelta(hours=1)


class CredentialsError(InputError):
    """Credentials that cannot be made or found; the text names the file."""


def make_authority(folder: Path, days: int = 3650) -> None:
    """Make `ca.crt` and `ca.key`. Raises CredentialsError where they exist already."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name("FoMoE federation authority")
    certificate = (
        _certificate(name, name, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    _write(folder / "ca.key", _pem(key), private=True)
    _write(folder / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM))


def make_server_certificate(folder: Path, hosts: Sequence[str], days: int = 825) -> None:
    """Make `server.crt` and `server.key` for these host names and addresses, signed by `ca.key`."""
    if not hosts:
        raise CredentialsError("a server certificate needs at least one host name or address")
    authority = x509.load_pem_x509_certificate(_read(folder / "ca.crt"))
    signer = serialization.load_pem_private_key(_read(folder / "ca.key"), password=None)
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise CredentialsError(f"{folder / 'ca.key'} is not an elliptic-curve key")
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = (
        _certificate(_name(hosts[0]), authority.subject, key.public_key(), days)
        .add_extension(
            x509.SubjectAlternativeName([_alternative(host) for host in hosts]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .sign(signer, hashes.SHA384())
    )
    _write(folder / "server.key", _pem(key), private=True)
    _write(folder / "server.crt", certificate.public_bytes(serialization.Encoding.PEM))


def make_node_key(folder: Path, name: str) -> Path:
    """Make a SuperNode's key pair; return the private file, beside which lies its `.pub`."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise CredentialsError(f"node name {name!r} must be letters, digits, '.', '_' or '-'")
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        # Flower reads no other form of a node's key.
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    _write(folder / name, private, private=True)
    _write(folder / f"{name}.pub", public + b" " + name.encode() + b"\n")
    return folder / name


def make_secret(path: Path) -> None:
    """Make a file of 32 random bytes, in hexadecimal."""
    _write(path, secrets.token_hex(32).encode(), private=True)


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(**used: bool) -> x509.KeyUsage:
    names = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{name: used.get(name, False) for name in names})


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CredentialsError(f"cannot read {path}: {error.strerror}") from error


def _write(path: Path, content: bytes, private: bool = False) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Never readable to others, not even between creation and chmod.
        mode = 0o600 if private else 0o644
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        raise CredentialsError(f"{path} exists already: it is not overwritten") from error
    except OSError as error:
        raise CredentialsError(f"cannot write {refusal(error)}") from error
    with os.fdopen(descriptor, "wb") as sink:
        sink.write(content)
