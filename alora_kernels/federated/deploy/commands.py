"""What Flower's daemons are started with, by `runs` and `alora fed`: commands, environment, certificates and keys.

FLWR_HOME lies inside the run's folder: neither configuration nor state of the user is touched. Certificates and keys
from elsewhere (`openssl`, `step`, `ssh-keygen -t ecdsa -b 384`) work as well as those made here.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from ...text import NAME, install
from .. import ENVIRONMENT
from .processes import FlowerError, free_port

CONNECTION = "server"  # name of the one connection in a home's config.toml
LOOPBACK = "127.0.0.1"
LOCAL = ("localhost", LOOPBACK)  # always in the certificate: the server's own processes call it there


def environment(home: Path) -> dict[str, str]:
    """The whole environment of Flower's processes: this one's, `ENVIRONMENT`, `<home>/flwr` as FLWR_HOME, a PATH."""
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, **ENVIRONMENT, "FLWR_HOME": str(Path(home).resolve() / "flwr"), "PATH": programs}


def program(name: str) -> str:
    """Path of one of Flower's programs, of this Python first; a FlowerError if Flower is not installed."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None or importlib.util.find_spec("flwr") is None:
        raise FlowerError(f"{name} is not installed: {install('federated')}")
    return found


def connect(home: Path, address: str, ca: Path | None = None) -> None:
    """Write where `flwr` commands with this home find the SuperLink: at "host:port"; only a simulation has no `ca`."""
    trust = "insecure = true" if ca is None else f"root-certificates = {json.dumps(str(Path(ca).resolve()))}"
    file = Path(home) / "flwr" / "config.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ["[superlink]", f'default = "{CONNECTION}"', "", f"[superlink.{CONNECTION}]"]
    file.write_text("\n".join([*lines, f"address = {json.dumps(address)}", trust, ""]))


def superlink_command(
    home: Path, *, host: str = LOOPBACK, port: int = 8000, certificates: Certificates | None = None
) -> list[str]:
    """Program and arguments of a server's SuperLink; other machines reach its clients' interface only, see `superlink`.

    `<home>/superlink.db` keeps registered keys over a restart; `host` is "0.0.0.0" for clients on other machines.
    Certificates mean TLS, and only clients whose key was registered; without them it is a simulation on this machine,
    and another host a ValueError. A FlowerError if Flower or a certificate file is missing.
    """
    program("flower-superlink")
    command = [sys.executable, "-m", "alora_kernels.federated.deploy.superlink", "--host", host, "--port", str(port)]
    command += ["--database", str(Path(home).resolve() / "superlink.db"), "--disable-runtime-dependency-installation"]
    if certificates is None:
        if host != LOOPBACK:
            raise ValueError(f"host {host!r} needs certificates: without TLS the server listens on {LOOPBACK} only")
        return [*command, "--insecure", "--simulation"]
    files = {"cert": certificates.certificate, "key": certificates.key, "ca-cert": certificates.ca}
    for kind, file in files.items():
        command += [f"--ssl-{kind}file", str(existing(file, "make_certificates"))]
    return [*command, "--enable-supernode-auth"]


def supernode_command(
    client: str,
    server: str,
    *,
    ca: Path,
    key: Path,
    state_dir: Path,
    config: Path | None = None,
    data: Path | None = None,
) -> list[str]:
    """Program and arguments of a client's SuperNode.

    `client` is its name, the same after every restart; `server` the SuperLink's "host:port", a name or address in its
    certificate; `ca` the `ca.pem` it got from there, so that nobody else is trusted; `key` its private key; `state_dir`
    keeps its private parts. Without a `config` of its own the server's counts; with it, it says what is shared. A
    ValueError for a name or path that Flower's node configuration cannot hold, a FlowerError for what is missing.
    """
    node = {"client": check_name(client), "state-dir": str(Path(state_dir).resolve())}
    for what, file in (("config", config), ("data", data)):
        if file is not None:
            node[what] = str(existing(file, "this client"))
    command = [program("flower-supernode"), "--superlink", server]
    command += ["--root-certificates", str(existing(ca, "a copy of the server's ca.pem"))]
    command += ["--auth-supernode-private-key", str(existing(key, "make_node_key"))]
    return [*command, "--host", LOOPBACK, "--port", str(free_port()), "--node-config", node_config(node)]


def node_config(values: Mapping[str, str]) -> str:
    """Pairs as Flower's `--node-config` wants them: `key='value'`; it has no escape for what is refused here."""
    for key, value in values.items():
        if "'" in value or not value.isprintable():
            raise ValueError(f"{key} must not hold quotes or control characters, got {value!r}")
    return " ".join(f"{key}='{value}'" for key, value in values.items())


def existing(file: Path, source: str) -> Path:
    """The file, with its whole path; a FlowerError says where it comes from if there is none."""
    if not Path(file).is_file():
        raise FlowerError(f"{file} is missing; it comes from {source}")
    return Path(file).resolve()


class Certificates:
    """A folder with a server's TLS files: `ca.pem` (for every client), `server.pem` and `server.key` (stay with it)."""

    def __init__(self, folder: Path) -> None:
        self.ca, self.certificate, self.key = (Path(folder) / n for n in ("ca.pem", "server.pem", "server.key"))


def make_certificates(folder: Path, hosts: Iterable[str] = LOCAL, days: int = 365) -> Certificates:
    """An authority and a server certificate signed by it, valid for so many days.

    The authority's own key is never written: a new server certificate means a new `ca.pem` for everyone. `hosts` are
    the names and addresses under which clients reach the server; this machine's own are added. A ValueError for days
    below one, a FileExistsError if one of the files is there already.
    """
    if days < 1:
        raise ValueError(f"days must be >= 1, got {days}")
    files = Certificates(folder)
    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = _certificate("federation authority", authority, authority, days)
    names = x509.SubjectAlternativeName([_alternative(host) for host in dict.fromkeys([*hosts, *LOCAL])])
    certificate = _certificate("federation server", server, authority, days, ca, names)
    contents = {
        files.ca: ca.public_bytes(Encoding.PEM),
        files.certificate: certificate.public_bytes(Encoding.PEM),
        files.key: server.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    }
    _write(contents, private=files.key)
    return files


def make_node_key(folder: Path, client: str) -> tuple[Path, Path]:
    """A key pair with which a client proves to the server who it is, as `ssh-keygen -t ecdsa -b 384` writes it.

    `<folder>/<client>` never leaves the client; the server registers `<client>.pub`. ValueError: a name that is not a
    file name; FileExistsError: one of the files is there already.
    """
    private = Path(folder) / check_name(client)
    public = private.with_name(f"{client}.pub")
    key = ec.generate_private_key(ec.SECP384R1())
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + f" {client}\n".encode()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    _write({private: pem, public: line}, private=private)
    return private, public


def check_name(client: str) -> str:
    """A client's name, if it can be a file name and a value of Flower's node configuration; else a ValueError."""
    if not NAME.fullmatch(client):
        raise ValueError(
            f"client must be up to 64 letters, digits, '.', '-', '_' and begin with a letter or digit, got {client!r}"
        )
    return client


def _write(contents: Mapping[Path, bytes], *, private: Path) -> None:
    """New files in one folder, one of them for its owner alone: a lost node key is a client to be registered again."""
    for file in contents:
        if file.exists():
            raise FileExistsError(f"{file} exists; keep it, or move it away to make a new one")
    private.parent.mkdir(parents=True, exist_ok=True)
    for file, content in contents.items():
        mode = 0o600 if file == private else 0o644
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as sink:
            sink.write(content)


def _certificate(
    subject: str,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    days: int,
    ca: x509.Certificate | None = None,
    names: x509.SubjectAlternativeName | None = None,
) -> x509.Certificate:
    """An authority's certificate, which signs itself; or with `ca` and `names` a server's that the authority signs."""
    now, signs = datetime.now(UTC), ca is None
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)])
    # a server signs connections, an authority certificates and their revocations; the other uses are nobody's
    usage = x509.KeyUsage(not signs, False, False, False, False, signs, signs, False, False)
    builder = (
        x509.CertificateBuilder(ca.subject if ca else name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # clocks of server and clients may differ
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.BasicConstraints(ca=signs, path_length=0 if signs else None), critical=True)
        .add_extension(usage, critical=True)
    )
    if names is not None:
        # the authority's key identifier is what strict verification (Python 3.13's default) follows
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
        purpose = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH])
        for extension in (purpose, issuer, names):
            builder = builder.add_extension(extension, critical=False)
    return builder.sign(signer, hashes.SHA256())


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
