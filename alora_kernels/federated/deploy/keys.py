"""Certificates and keys for a federation: TLS for the server, one key pair for each client.

In:   a folder and the names under which clients reach the server.
Out:  `ca.pem`, `server.pem`, `server.key`; `<client>` and `<client>.pub`. Private files are readable by their owner.
Who:  `alora fed keys` and the loopback example; keys from elsewhere (`openssl`, `ssh-keygen`) work as well.

Clients get `ca.pem` and trust nobody else, so the authority needs to sign only once: its own key is never written, and
a new server certificate means a new `ca.pem` for everyone. Files are never overwritten, because a lost node key is a
client that has to be registered again. Needs `cryptography`, which comes with Flower.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from ..names import NAME

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

LOCAL = ("localhost", "127.0.0.1")  # always in the certificate: the server's own processes call it there
_CLOCKS = timedelta(hours=1)  # how far the clocks of server and clients may differ


@dataclass(frozen=True)
class Certificates:
    """Where the TLS files of a server are.

    Attributes:
        folder: holds `ca.pem` (give it to every client), `server.pem` and `server.key` (stay with the server).
    """

    folder: Path

    @property
    def ca(self) -> Path:
        """The authority's certificate."""
        return self.folder / "ca.pem"

    @property
    def certificate(self) -> Path:
        """The server's certificate."""
        return self.folder / "server.pem"

    @property
    def key(self) -> Path:
        """The server's private key."""
        return self.folder / "server.key"


def check_name(client: str) -> str:
    """A client's name, if it can be a file name and a value of Flower's node configuration.

    Raises:
        ValueError: anything but letters, digits, dot, hyphen and underscore, or longer than 64.
    """
    if not NAME.fullmatch(client):
        raise ValueError(
            f"client must be up to 64 letters, digits, '.', '-', '_' and begin with a letter or digit, got {client!r}"
        )
    return client


def make_certificates(folder: Path, hosts: Iterable[str] = LOCAL, days: int = 365) -> Certificates:
    """An authority and a server certificate signed by it.

    Args:
        folder: where to write; made if missing.
        hosts: names and addresses under which clients reach the server; this machine's own are added.
        days: how long both are valid.

    Returns:
        The paths.

    Raises:
        ValueError: days below one.
        FileExistsError: one of the files is there already.
    """
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    if days < 1:
        raise ValueError(f"days must be >= 1, got {days}")
    files = Certificates(Path(folder))
    _refuse_existing(files.ca, files.certificate, files.key)
    files.folder.mkdir(parents=True, exist_ok=True)
    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = _authority(authority, days).sign(authority, hashes.SHA256())
    certificate = _server(server, ca, list(dict.fromkeys([*hosts, *LOCAL])), days).sign(authority, hashes.SHA256())
    _write(files.ca, ca.public_bytes(serialization.Encoding.PEM), 0o644)
    _write(files.certificate, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    _write(
        files.key,
        server.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        0o600,
    )
    return files


def make_node_key(folder: Path, client: str) -> tuple[Path, Path]:
    """A key pair with which a client proves to the server who it is.

    Args:
        folder: where to write; made if missing.
        client: its name, the name of the files.

    Returns:
        Private key, which never leaves the client, and public key, which the server registers: the same as
        `ssh-keygen -t ecdsa -b 384` writes.

    Raises:
        ValueError: a name that is not a file name, see `check_name`.
        FileExistsError: one of the files is there already.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = Path(folder) / check_name(client)
    public = private.with_name(f"{client}.pub")
    _refuse_existing(private, public)
    private.parent.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    openssh = serialization.PrivateFormat.OpenSSH
    _write(private, key.private_bytes(serialization.Encoding.PEM, openssh, serialization.NoEncryption()), 0o600)
    line = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(public, line + f" {client}\n".encode(), 0o644)
    return private, public


def _refuse_existing(*files: Path) -> None:
    for file in files:
        if file.exists():
            raise FileExistsError(f"{file} exists; keep it, or move it away to make a new one")


def _write(file: Path, content: bytes, mode: int) -> None:
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as sink:
        sink.write(content)


def _builder(subject: str, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(common: str) -> x509.Name:
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common)])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _authority(key: ec.EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    from cryptography import x509

    name = "federation authority"
    return (
        _builder(name, _name(name), key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
    )


def _server(
    key: ec.EllipticCurvePrivateKey, ca: x509.Certificate, hosts: list[str], days: int
) -> x509.CertificateBuilder:
    from cryptography import x509

    # the authority's key identifier is what strict verification (Python 3.13's default) follows
    issuer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
        ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    )
    return (
        _builder("federation server", ca.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(issuer, critical=False)
        .add_extension(x509.SubjectAlternativeName([_alternative(host) for host in hosts]), critical=False)
    )


def _alternative(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
