"""An identity: a private key, the certificate that says whose it is, and the authority that says so.

Here too: how gRPC is told to use one, and who is at the other end of a connection. Nothing here issues anything,
and nothing knows a network address.

NOTE [Names in certificates]
The common name is the name. Name and role stand together in one URI among the subject's alternative names,
`housecall:worker/clinic` (as SPIFFE does it), and both places must agree. Hosts are for TLS alone: a client checks
that it reached the machine that it dialled; a server asks who, never from where.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ..errors import IdentityError
from .files import make_folder, read_private, replace
from .names import AUTHORITY, check_name, check_role

__all__ = [
    "MALFORMED",
    "Identity",
    "Principal",
    "client_credentials",
    "load_certificate",
    "new_key",
    "principal",
    "principal_of",
    "request_certificate",
    "server_credentials",
    "utc_now",
]

FILE = "identity.pem"
MAX_BYTES = 64 << 10  # of a bundle; a common one has 2,000
SCHEME = "housecall:"

# What `cryptography` raises on a certificate, a request, a list or a key that is not well made, or ill signed.
MALFORMED = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.AttributeNotFound,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)

_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----\s.*?-----END \1-----", re.DOTALL)


def utc_now() -> datetime:
    """The time, with its zone."""
    return datetime.now(UTC)


_NEVER = datetime.max.replace(tzinfo=UTC)  # the end of a principal in this process, who needs no certificate


@dataclass(frozen=True, slots=True)
class Principal:
    """Who somebody is, once it has been shown. `serial` is their certificate's, for the revocation list, and
    `not_after` its end: a stream may outlive both."""

    name: str
    role: str
    serial: int
    not_after: datetime = _NEVER

    def __str__(self) -> str:
        """As in messages and logs: `scientist 'alice'`."""
        return f"{self.role} '{self.name}'"


@dataclass(frozen=True, repr=False)
class Identity:
    """Key, certificate and the authority's certificate, all PEM. They are checked to belong together: an identity
    that exists is whole, though it may have ended. Raises `IdentityError` where they do not."""

    key: bytes
    certificate: bytes
    ca: bytes

    def __post_init__(self) -> None:
        _check_pair(load_private_key(self.key), self.parsed, load_certificate(self.ca))
        assert self.principal

    def __repr__(self) -> str:
        """Whose it is; never the key."""
        return f"<Identity {self.principal}, serial {self.serial:x}, until {self.not_after:%Y-%m-%d %H:%M} UTC>"

    @cached_property
    def parsed(self) -> x509.Certificate:
        """The certificate, parsed."""
        return load_certificate(self.certificate)

    @cached_property
    def principal(self) -> Principal:
        """Whom the certificate names."""
        return principal_of(self.parsed)

    @property
    def name(self) -> str:
        """Whose it is."""
        return self.principal.name

    @property
    def role(self) -> str:
        """What they may be: "worker" or "scientist"."""
        return self.principal.role

    @property
    def serial(self) -> int:
        """The certificate's number, by which it is revoked."""
        return self.principal.serial

    @property
    def not_before(self) -> datetime:
        """When the certificate begins, UTC."""
        return self.parsed.not_valid_before_utc

    @property
    def not_after(self) -> datetime:
        """When the certificate ends, UTC."""
        return self.parsed.not_valid_after_utc

    @property
    def renews_at(self) -> datetime:
        """When two thirds of its life are over: the last third is there for retries."""
        return self.not_before + (self.not_after - self.not_before) * 2 / 3

    def sign(self, data: bytes) -> bytes:
        """An ECDSA signature (SHA-256, DER) with the private key."""
        return load_private_key(self.key).sign(data, ec.ECDSA(hashes.SHA256()))

    @classmethod
    def load(cls, path: str | Path) -> Identity:
        """The identity in a folder, or in one PEM file with key, certificate and the authority's certificate.

        Raises `IdentityError` if it is missing or damaged, or if others than its owner may read it."""
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        try:
            return cls.parse(read_private(path, MAX_BYTES))
        except IdentityError as error:
            raise IdentityError(f"no identity from {path}: {error}") from None

    @classmethod
    def parse(cls, bundle: bytes) -> Identity:
        """The identity in the text of such a file. Raises `IdentityError`."""
        blocks = [(found[1], found[0] + b"\n") for found in _BLOCK.finditer(bundle)]
        keys = [block for kind, block in blocks if kind.endswith(b"PRIVATE KEY")]
        certificates = [block for kind, block in blocks if kind == b"CERTIFICATE"]
        if len(keys) != 1 or len(certificates) != 2:
            raise IdentityError(
                f"found {len(keys)} private keys and {len(certificates)} certificates in PEM form; expected one key, "
                "its certificate and the authority's"
            )
        # Whichever order: the authority's is the one that signed itself.
        certificates.sort(key=lambda pem: _is_own_issuer(load_certificate(pem)))
        return cls(keys[0], *certificates)

    def save(self, path: str | Path) -> Path:
        """Write it, readable by its owner alone, into a folder (made if need be) or to a file that ends in `.pem`.

        One file, replaced at once: key and certificate never fall apart. Returns the file's path."""
        path = Path(path)
        if path.suffix != ".pem" or path.is_dir():
            make_folder(path)
            path = path / FILE
        replace(path, self.key + self.certificate + self.ca, private=True)
        return path


def _is_own_issuer(certificate: x509.Certificate) -> bool:
    return certificate.subject == certificate.issuer


def _check_pair(key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, ca: x509.Certificate) -> None:
    try:
        if certificate.public_key() != key.public_key():
            raise IdentityError("the certificate belongs to another key than the one beside it")
        if not ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            raise IdentityError("the authority's certificate is no authority's")
        certificate.verify_directly_issued_by(ca)
    except MALFORMED:
        raise IdentityError("the certificate was not signed by the authority beside it") from None


# -- keys, requests, certificates ---------------------------------------------------------------------------


def new_key() -> bytes:
    """A new private key, PEM: elliptic curve P-256. Its randomness is the system's; nobody may choose it."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def load_private_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """The P-256 key of a PEM text. Raises `IdentityError`."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except TypeError:
        raise IdentityError("the private key is locked with a password; expected a plain one") from None
    except MALFORMED:
        raise IdentityError("the private key is damaged") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityError("the private key is of another kind; expected elliptic curve P-256")
    return key


def load_certificate(pem: bytes) -> x509.Certificate:
    """The certificate of a PEM text. Raises `IdentityError`."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except MALFORMED:
        raise IdentityError("the certificate is damaged") from None


def request_certificate(key: bytes, name: str) -> bytes:
    """A certificate signing request (PKCS #10, PEM) for a key. The authority decides which name it writes."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, check_name(name))])
    builder = x509.CertificateSigningRequestBuilder(subject)
    return builder.sign(load_private_key(key), hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def principal_of(certificate: x509.Certificate) -> Principal:
    """Whom a certificate names. Who signed it must be known already. Raises `IdentityError`."""
    try:
        names = [str(found.value) for found in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        others = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = [uri for uri in others.get_values_for_type(x509.UniformResourceIdentifier) if uri.startswith(SCHEME)]
    except MALFORMED:
        raise IdentityError("the certificate names no principal of Housecall") from None
    if len(names) != 1 or len(uris) != 1:
        raise IdentityError(f"the certificate names {len(names)} common names and {len(uris)} roles; expected one each")
    role, _, name = uris[0].removeprefix(SCHEME).partition("/")
    if name != names[0]:
        raise IdentityError(f"the certificate names both {names[0][:80]!r} and {name[:80]!r}; expected one name")
    check_name(name)
    if role != AUTHORITY:
        check_role(role)
    return Principal(name, role, certificate.serial_number, certificate.not_valid_after_utc)


# -- gRPC ---------------------------------------------------------------------------------------------------


def client_credentials(identity: Identity) -> grpc.ChannelCredentials:
    """What a client shows and trusts: its own certificate, and servers that the same authority vouches for."""
    return grpc.ssl_channel_credentials(identity.ca, identity.key, identity.certificate)


def server_credentials(source: Callable[[], Identity], *, ask_clients: bool = True) -> grpc.ServerCredentials:
    """What a server shows, and whom it lets in: clients with a certificate of the same authority, nobody else.

    `source` is asked at every handshake, so that a renewed identity is used without a restart; it must be quick, and
    when it fails the last identity stays. With `ask_clients=False` anyone may connect, unknown."""
    shown = source()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal shown
        now = source()
        if now is shown:
            return None  # nothing has changed
        shown = now
        return _configuration(now)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(shown),
        fetch,  # type: ignore[arg-type]  # the stubs do not know that None means unchanged
        ask_clients,
    )


def _configuration(identity: Identity) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(identity.key, identity.certificate)], identity.ca)


def principal(auth_context: Mapping[str, Iterable[bytes]], now: datetime | None = None) -> Principal:
    """Who is at the other end, from gRPC's `context.auth_context()` on a server with `server_credentials`.

    TLS has checked the signature by then. Given `now`, the end is checked again, since a resumed TLS session does not.
    Raises `IdentityError` if there is no certificate, or it names nobody."""
    kinds = tuple(auth_context.get("transport_security_type", ()))
    found = tuple(auth_context.get("x509_pem_cert", ()))
    if kinds not in ((b"ssl",), (b"tls",)) or len(found) != 1:
        raise IdentityError(
            "the caller showed no certificate: connect with grpcs:// and an identity (`housecall ca join` makes one)"
        )
    who = principal_of(load_certificate(found[0]))
    if now is not None and now > who.not_after:
        raise IdentityError(f"the certificate of {who} ended {who.not_after:%Y-%m-%d %H:%M} UTC: renew it")
    return who
