"""Credentials: who is let in by them, who is not, and who may read them."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fomoe_flwr.cli.main import main
from fomoe_flwr.federation.deployment.credentials import (
    CredentialsError,
    make_authority,
    make_node_key,
    make_secret,
    make_server_certificate,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_authority(tmp_path / "own")
    make_server_certificate(tmp_path / "own", ["link.example.org", "localhost", "127.0.0.1"])
    return tmp_path / "own"


def shake_hands(folder: Path, trusted: Path, name: str) -> str:
    """Connect over TLS; return the protocol. Raises what the client raises."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.crt", folder / "server.key")
    ours, theirs = socket.socketpair()

    def answer() -> None:
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        client = ssl.create_default_context(cafile=str(trusted))
        with client.wrap_socket(ours, server_hostname=name) as connection:
            return str(connection.version())
    finally:
        ours.close()
        thread.join()


@pytest.mark.parametrize("name", ["link.example.org", "localhost", "127.0.0.1"])
def test_a_client_that_trusts_the_authority_is_served_under_every_name(
    name: str, folder: Path
) -> None:
    assert shake_hands(folder, folder / "ca.crt", name) == "TLSv1.3"


def test_another_authority_or_name_is_refused(folder: Path, tmp_path: Path) -> None:
    make_authority(tmp_path / "other")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(folder, tmp_path / "other" / "ca.crt", "localhost")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(folder, folder / "ca.crt", "link.example.com")


def test_the_certificate_names_its_hosts_and_is_no_authority(folder: Path) -> None:
    certificate = x509.load_pem_x509_certificate((folder / "server.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["link.example.org", "localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("127.0.0.1")]
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert not constraints.ca
    now = datetime.datetime.now(datetime.UTC)
    left = certificate.not_valid_after_utc - now
    assert datetime.timedelta(days=800) < left < datetime.timedelta(days=826)
    assert certificate.not_valid_before_utc < now


def test_a_node_key_is_what_flower_reads(tmp_path: Path) -> None:
    path = make_node_key(tmp_path, "berlin")
    private = serialization.load_ssh_private_key(path.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.curve.name == "secp384r1"
    public = serialization.load_ssh_public_key((tmp_path / "berlin.pub").read_bytes())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert public.public_numbers() == private.public_key().public_numbers()


def test_what_is_secret_is_for_its_owner_and_nothing_is_overwritten(folder: Path) -> None:
    make_node_key(folder, "node")
    make_secret(folder / "secret")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    for name in ("ca.key", "server.key", "node", "secret"):
        assert modes[name] == 0o600, name
    before = (folder / "ca.key").read_bytes()
    for make in (
        lambda: make_authority(folder),
        lambda: make_server_certificate(folder, ["localhost"]),
        lambda: make_node_key(folder, "node"),
        lambda: make_secret(folder / "secret"),
    ):
        with pytest.raises(CredentialsError, match="exists already: it is not overwritten"):
            make()
    assert (folder / "ca.key").read_bytes() == before


@pytest.mark.parametrize("name", ["", "../evil", "a/b", ".hidden", "-x", "a b", "x" * 65])
def test_a_node_name_that_is_no_file_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CredentialsError, match="must be letters"):
        make_node_key(tmp_path / "keys", name)
    assert not (tmp_path / "keys").exists()


def test_the_commands_make_them_and_refuse_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["federation", "credentials", str(tmp_path), "--host", "link.example.org"]
    assert main(words) == 0
    assert main(["federation", "node-key", str(tmp_path), "berlin"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("berlin", "berlin.pub", "ca.crt", "ca.key"),
        *("server.crt", "server.key", "superexec.secret"),
    ]
    # On its own machine, and in deploy/compose, it has names that nobody needs to give.
    certificate = x509.load_pem_x509_certificate((tmp_path / "server.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    dns = names.get_values_for_type(x509.DNSName)
    assert dns == ["link.example.org", "localhost", "superlink"]
    capsys.readouterr()
    assert main(words) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'ca.key'} exists already: it is not overwritten\n"
    )
