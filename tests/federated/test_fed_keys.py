"""Certificates and node keys: who is trusted, what Flower reads, what nobody else may read."""

from __future__ import annotations

import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from alora_kernels.federated.deploy import commands as flower_keys


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def handshake(files: flower_keys.Certificates, name: str, ca: Path) -> str:
    """The subject a client sees that calls `name` and trusts `ca`."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(files.certificate, files.key)
    context = ssl.create_default_context(cafile=str(ca))
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # what Python 3.13 does by default
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            try:
                server.wrap_socket(connection, server_side=True).close()
            except (ssl.SSLError, OSError):
                connection.close()  # the client turned away

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname()) as raw,
                context.wrap_socket(raw, server_hostname=name) as secure,
            ):
                return str(secure.getpeercert()["subject"])  # type: ignore[index]
        finally:
            thread.join(5)


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "fed.example.org"])
def test_the_certificate_holds_for_its_hosts_and_for_this_machine(tmp_path, name):
    files = flower_keys.make_certificates(tmp_path, ["fed.example.org"])
    assert "federation server" in handshake(files, name, files.ca)


def test_the_certificate_holds_for_nobody_else(tmp_path):
    files, other = (flower_keys.make_certificates(tmp_path / name) for name in ("one", "two"))
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
        handshake(files, "other.example.org", files.ca)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(files, "localhost", other.ca)


def test_only_the_owner_reads_private_files_and_the_authority_keeps_no_key(tmp_path):
    files = flower_keys.make_certificates(tmp_path / "tls")
    private, public = flower_keys.make_node_key(tmp_path / "tls", "clinic")
    assert {file.name for file in (tmp_path / "tls").iterdir()} == {
        "ca.pem", "server.pem", "server.key", "clinic", "clinic.pub"
    }  # fmt: skip
    assert mode(files.key) == mode(private) == 0o600
    assert mode(files.ca) == mode(public) == 0o644


def test_node_keys_are_what_flower_reads(tmp_path):
    from flwr.supercore.primitives.asymmetric import uses_nist_ec_curve

    private, public = flower_keys.make_node_key(tmp_path, "clinic")
    pair = serialization.load_ssh_private_key(private.read_bytes(), None).public_key()
    assert pair == serialization.load_ssh_public_key(public.read_bytes())
    assert uses_nist_ec_curve(pair)
    assert public.read_text().startswith("ecdsa-sha2-nistp384 ")
    assert public.read_text().endswith(" clinic\n")


def test_nothing_is_overwritten(tmp_path):
    flower_keys.make_certificates(tmp_path)
    flower_keys.make_node_key(tmp_path, "clinic")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match=r"ca\.pem exists"):
        flower_keys.make_certificates(tmp_path)
    with pytest.raises(FileExistsError, match="clinic exists"):
        flower_keys.make_node_key(tmp_path, "clinic")
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_authority_signs_once(tmp_path):
    authority = x509.load_pem_x509_certificate(flower_keys.make_certificates(tmp_path, days=30).ca.read_bytes())
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    assert (authority.not_valid_after_utc - authority.not_valid_before_utc).days == 30
    with pytest.raises(ValueError, match="days must be >= 1"):
        flower_keys.make_certificates(tmp_path / "x", days=0)


@pytest.mark.parametrize("name", ["", "two words", "../up", "a'b", "-x", "a" * 65, "line\n"])
def test_names_that_are_no_file_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="client must be"):
        flower_keys.make_node_key(tmp_path, name)
