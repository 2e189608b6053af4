"""The authority: signs certificates, gives invitations, revokes. It knows no network; `enrolment` opens a door to it.

NOTE [What the authority believes]
A signing request is believed in one thing: that its sender holds the private key. Names, hosts and uses that it asks
for are not read. What a certificate says comes from the owner's command or from the invitation, and a renewal says
what the certificate before it said.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from msgspec.structs import replace as changed

from ..errors import IdentityError
from .certificate import (
    MALFORMED,
    SCHEME,
    Identity,
    load_certificate,
    load_private_key,
    new_key,
    request_certificate,
    utc_now,
)
from .files import make_folder, read, read_private, replace
from .index import Index, Invited, Issued, Record
from .invitation import Invitation
from .names import AUTHORITY, AUTHORITY_HOST, check_hosts, check_name, check_role, target
from .revocation import read_crl

__all__ = ["LIFETIME", "MAX_CSR_BYTES", "Authority"]

LIFETIME = timedelta(days=7)
MAX_LIFETIME = timedelta(days=90)
MAX_INVITATION = timedelta(days=365)
MAX_CSR_BYTES = 16 << 10
OWN_LIFETIME = timedelta(days=3650)
SKEW = timedelta(minutes=5)  # a certificate begins a little earlier, for clocks that are slow
CRL_FRESH, CRL_VALID = timedelta(days=1), timedelta(days=7)
KEY, CERTIFICATE, CRL = "ca.key", "ca.pem", "crl.pem"
MAX_BYTES = 64 << 10
MAX_CRL_BYTES = 64 << 20


class Authority:
    """A certificate authority in a folder: `ca.key` (mode 0600), `ca.pem`, `crl.pem` and `index.json`.

    Whoever holds the folder can become anyone in the federation. Several processes may use it at once."""

    def __init__(self, folder: Path, key: bytes, ca: bytes, now: Callable[[], datetime]) -> None:
        self.folder = folder
        self.ca = ca
        self._certificate = load_certificate(ca)
        self._key = load_private_key(key)
        if self._certificate.public_key() != self._key.public_key():
            raise IdentityError(f"{folder / CERTIFICATE} does not belong to {folder / KEY}: put back the pair you keep")
        self._index = Index(folder)
        self._clock = now

    def __repr__(self) -> str:
        """Its name and folder."""
        return f"<Authority '{self.name}' in {self.folder}>"

    @classmethod
    def create(
        cls, folder: str | Path, name: str, *, url: str = "", now: Callable[[], datetime] = utc_now
    ) -> Authority:
        """A new authority, valid for ten years. `url` (HOST:PORT) is where newcomers will find its server.

        Raises `IdentityError` if the folder holds an authority already."""
        folder = Path(folder)
        check_name(name)
        if url:
            target(url)
        if any((folder / file).exists() for file in (KEY, CERTIFICATE)):
            raise IdentityError(f"{folder} holds an authority already: name another folder")
        make_folder(folder)
        key = new_key()
        ca = _own_certificate(load_private_key(key), name, now().replace(microsecond=0))
        replace(folder / KEY, key, private=True)
        replace(folder / CERTIFICATE, ca)
        made = cls(folder, key, ca, now)
        made._index.create(Record(url=url, crl_number=1))
        made._publish()
        return made

    @classmethod
    def load(cls, folder: str | Path, *, now: Callable[[], datetime] = utc_now) -> Authority:
        """The authority in a folder. Raises `IdentityError` if it is missing, damaged, or its key is open to others."""
        folder = Path(folder)
        if not (folder / KEY).exists():
            raise IdentityError(f"{folder} holds no authority: `housecall ca init {folder}` makes one")
        loaded = cls(folder, read_private(folder / KEY, MAX_BYTES), read(folder / CERTIFICATE, MAX_BYTES), now)
        loaded._index.read()
        return loaded

    def _now(self) -> datetime:
        return self._clock().replace(microsecond=0)  # certificates count whole seconds

    @property
    def name(self) -> str:
        """What it was called when it was made."""
        return str(self._certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)

    # -- certificates ---------------------------------------------------------------------------------------

    def issue(
        self, csr: bytes, name: str, role: str, hosts: Iterable[str] = (), lifetime: timedelta = LIFETIME
    ) -> bytes:
        """A certificate (PEM) for the key of a signing request. Raises `IdentityError` if anything is unfit."""
        key = _requested_key(csr)
        check_role(role)
        with self._index.changing() as record:
            return self._sign(record, key, name, role, check_hosts(hosts, role), lifetime)

    def identity(
        self, name: str, role: str, hosts: Iterable[str] = (), lifetime: timedelta = LIFETIME, *, key: bytes = b""
    ) -> Identity:
        """A whole identity, with a new key unless one is given: for machines that share the authority's own fate."""
        key = key or new_key()
        return Identity(key, self.issue(request_certificate(key, name), name, role, hosts, lifetime), self.ca)

    def server_identity(self) -> Identity:
        """What the authority's own server shows to newcomers. It lets nobody in anywhere else."""
        key = new_key()
        public = load_private_key(key).public_key()
        with self._index.changing() as record:
            return Identity(key, self._sign(record, public, self.name, AUTHORITY, (AUTHORITY_HOST,), LIFETIME), self.ca)

    def renew(self, serial: int, csr: bytes) -> bytes:
        """A new certificate for the name, role, hosts and lifetime of one that is neither over nor revoked.

        The caller has checked that who asks holds the old key. Raises `IdentityError`."""
        key = _requested_key(csr)
        with self._index.changing() as record:
            old = next((issued for issued in record.issued if issued.serial == f"{serial:x}"), None)
            if old is None or old.role == AUTHORITY:
                raise IdentityError(f"no certificate with serial {serial:x} can be renewed: ask for an invitation")
            if old.revoked is not None:
                raise IdentityError(f"the certificate of {old.role} '{old.name}' is revoked: ask the authority's owner")
            if self._now() > old.not_after:
                raise IdentityError(
                    f"the certificate of {old.role} '{old.name}' ended {old.not_after:%Y-%m-%d %H:%M} UTC, and only "
                    "one that has not can be renewed: ask for a new invitation"
                )
            return self._sign(record, key, old.name, old.role, old.hosts, timedelta(seconds=old.lifetime))

    def issued(self) -> tuple[Issued, ...]:
        """All certificates ever issued, oldest first."""
        return tuple(self._index.read().issued)

    def _sign(
        self,
        record: Record,
        key: ec.EllipticCurvePublicKey,
        name: str,
        role: str,
        hosts: tuple[str, ...],
        lifetime: timedelta,
    ) -> bytes:
        check_name(name)
        if not timedelta() < lifetime <= MAX_LIFETIME:
            raise IdentityError(f"a certificate lives for up to {MAX_LIFETIME.days} days, found {lifetime}")
        now = self._now()
        start = max(now - SKEW, self._certificate.not_valid_before_utc)
        end = min(now + lifetime, self._certificate.not_valid_after_utc)
        if not start <= now < end:
            own = self._certificate
            raise IdentityError(
                f"the authority '{self.name}' itself is valid from {own.not_valid_before_utc:%Y-%m-%d} to "
                f"{own.not_valid_after_utc:%Y-%m-%d}, and it is {now:%Y-%m-%d}: mend the clock, or make a new authority"
            )
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self._certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
        )
        for extension, critical in self._extensions(key, name, role, hosts):
            builder = builder.add_extension(extension, critical)
        made = builder.sign(self._key, hashes.SHA256())
        serial = f"{made.serial_number:x}"
        record.issued.append(Issued(serial, name, role, hosts, start, end, round(lifetime.total_seconds())))
        return made.public_bytes(serialization.Encoding.PEM)

    def _extensions(
        self, key: ec.EllipticCurvePublicKey, name: str, role: str, hosts: tuple[str, ...]
    ) -> Iterable[tuple[x509.ExtensionType, bool]]:
        """What a certificate of ours says of its use (RFC 5280, section 4.2), and what is critical."""
        yield x509.BasicConstraints(ca=False, path_length=None), True
        yield _usage(digital_signature=True), True
        yield x509.ExtendedKeyUsage(_PURPOSES[role]), False
        yield (
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"{SCHEME}{role}/{name}"), *_sans(hosts)]),
            False,
        )
        yield x509.SubjectKeyIdentifier.from_public_key(key), False
        yield x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), False

    # -- invitations ----------------------------------------------------------------------------------------

    def invite(
        self,
        name: str,
        role: str,
        hosts: Iterable[str] = (),
        lifetime: timedelta = timedelta(days=1),
        url: str = "",
    ) -> Invitation:
        """Let whoever holds the invitation become `name`, once. An earlier one to the same name is withdrawn.

        `url` is where newcomers find the authority's server, unless it was said when the authority was made. Raises
        `IdentityError` if the name has a living certificate: two holders of one name could not be told apart."""
        check_name(name)
        check_role(role)
        hosts = check_hosts(hosts, role)
        if url:
            target(url)
        if not timedelta() < lifetime <= MAX_INVITATION:
            raise IdentityError(f"an invitation lasts for up to {MAX_INVITATION.days} days, found {lifetime}")
        secret = secrets.token_urlsafe(32)
        now = self._now()
        expires = now + lifetime
        with self._index.changing() as record:
            living = next((issued for issued in record.issued if _living(issued, now) and issued.name == name), None)
            if living is not None:
                raise IdentityError(
                    f"'{name}' has a certificate until {living.not_after:%Y-%m-%d %H:%M} UTC: revoke it first, or "
                    "choose another name"
                )
            _withdraw(record, name, now)
            record.invited.append(Invited(_digest(secret), name, role, hosts, expires))
            url = url or record.url
        return Invitation(
            name=name, role=role, hosts=hosts, url=url, expires=expires, secret=secret, ca=self.ca.decode()
        )

    def redeem(self, secret: str, csr: bytes) -> bytes:
        """The certificate (PEM) that an invitation is good for. Raises `IdentityError` if it is unknown, used,
        withdrawn or over; an unfit request leaves it unused.

        Used and issued are one change of the index: of two who hold the same invitation, one gets in."""
        key = _requested_key(csr)
        with self._index.changing() as record:
            place, invited = _find(record, secret)
            self._check_open(invited)
            record.invited[place] = changed(invited, used=self._now())
            return self._sign(record, key, invited.name, invited.role, invited.hosts, LIFETIME)

    def invited(self) -> tuple[Invited, ...]:
        """All invitations ever given, oldest first."""
        return tuple(self._index.read().invited)

    def _check_open(self, invited: Invited) -> None:
        whose = f"the invitation of {invited.role} '{invited.name}'"
        if invited.used is not None:
            raise IdentityError(
                f"{whose} was used {invited.used:%Y-%m-%d %H:%M} UTC: if that was not you, tell the authority's owner "
                "at once; else ask for another"
            )
        if invited.withdrawn is not None:
            raise IdentityError(f"{whose} was withdrawn {invited.withdrawn:%Y-%m-%d %H:%M} UTC: ask for another")
        if self._now() > invited.expires:
            raise IdentityError(f"{whose} ended {invited.expires:%Y-%m-%d %H:%M} UTC: ask for another")

    # -- revocation -----------------------------------------------------------------------------------------

    def revoke(self, who: str) -> tuple[Issued, ...]:
        """Revoke every living certificate of a name, or the one with a serial number (hexadecimal), and withdraw the
        name's invitation. A name comes first where both would do. Returns what was revoked.

        Raises `IdentityError` if nothing was there to be ended."""
        now = self._now()
        with self._index.changing() as record:
            named = [issued for issued in record.issued if issued.name == who and issued.role != AUTHORITY]
            found = named or [issued for issued in record.issued if issued.serial == who.lower()]
            ending = {issued.serial for issued in found if _living(issued, now)}
            withdrawn = _withdraw(record, who, now)
            if not ending and not withdrawn:
                raise IdentityError(_nothing_to_revoke(who, found))
            record.issued = [
                changed(issued, revoked=now) if issued.serial in ending else issued for issued in record.issued
            ]
            record.crl_number += 1
        self._publish()
        return tuple(issued for issued in record.issued if issued.serial in ending)

    def crl(self) -> bytes:
        """The revocation list (PEM), signed anew if the one in the folder is missing, behind, or a day old."""
        path = self.folder / CRL
        try:
            pem = read(path, MAX_CRL_BYTES)
            found = read_crl(pem, self._certificate)
            current = found.number == self._index.read().crl_number
            if current and self._now() - found.last_update < CRL_FRESH:
                return pem
        except IdentityError:
            pass  # whatever was there, a sound one takes its place
        with self._index.changing() as record:
            record.crl_number += 1
        return self._publish()

    def _publish(self) -> bytes:
        """Sign and write the list of what the index says. The index comes first: a crash between the two leaves a list
        whose number is behind, which `crl` mends."""
        with self._index.changing() as record:
            pem = self._signed_list(record)
            replace(self.folder / CRL, pem)
        return pem

    def _signed_list(self, record: Record) -> bytes:
        now = self._now()
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._certificate.subject)
            .last_update(now)
            .next_update(now + CRL_VALID)
            .add_extension(x509.CRLNumber(record.crl_number), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        for issued in record.issued:
            if issued.revoked is not None and issued.not_after + CRL_FRESH > now:  # what has ended needs no list
                entry = x509.RevokedCertificateBuilder().serial_number(int(issued.serial, 16))
                builder = builder.add_revoked_certificate(entry.revocation_date(issued.revoked).build())
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


# -- parts --------------------------------------------------------------------------------------------------

_PURPOSES = {
    "worker": [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH],
    "scientist": [ExtendedKeyUsageOID.CLIENT_AUTH],
    AUTHORITY: [ExtendedKeyUsageOID.SERVER_AUTH],
}


def _usage(**uses: bool) -> x509.KeyUsage:
    names = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{name: uses.get(name, False) for name in names})


def _sans(hosts: tuple[str, ...]) -> Iterable[x509.GeneralName]:
    for host in hosts:
        try:
            yield x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            yield x509.DNSName(host)


def _own_certificate(key: ec.EllipticCurvePrivateKey, name: str, now: datetime) -> bytes:
    # An organisation besides the name: no certificate that the authority signs can have its subject.
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Housecall certificate authority"),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + OWN_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _requested_key(csr: bytes) -> ec.EllipticCurvePublicKey:
    """The key of a signing request whose sender holds the private half. All else in it goes unread."""
    if len(csr) > MAX_CSR_BYTES:
        raise IdentityError(f"a signing request has at most {MAX_CSR_BYTES} bytes, found {len(csr)}")
    try:
        request = x509.load_pem_x509_csr(csr)
        key = request.public_key()
        sound = request.is_signature_valid
    except MALFORMED:
        raise IdentityError("the signing request is damaged: expected PKCS #10 in PEM form") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityError("the signing request has a key of another kind; expected elliptic curve P-256")
    if not sound:
        raise IdentityError("the signing request is not signed with its own key")
    return key


def _digest(secret: str) -> str:
    # Not salted and not slow, as a password's would have to be: the secret is 256 random bits.
    return hashlib.sha256(secret.encode()).hexdigest()


def _find(record: Record, secret: str) -> tuple[int, Invited]:
    """The invitation with a secret. All are compared, each in constant time: the answer's delay tells nothing."""
    digest = _digest(secret)
    found = [
        (place, invited) for place, invited in enumerate(record.invited) if hmac.compare_digest(invited.digest, digest)
    ]
    if not found:
        raise IdentityError("no invitation has this secret: ask the authority's owner for one")
    return found[0]


def _withdraw(record: Record, name: str, now: datetime) -> bool:
    """End the open invitations of a name; whether there were any."""
    open_ = [
        place
        for place, invited in enumerate(record.invited)
        if invited.name == name and invited.used is None and invited.withdrawn is None and invited.expires >= now
    ]
    for place in open_:
        record.invited[place] = changed(record.invited[place], withdrawn=now)
    return bool(open_)


def _living(issued: Issued, now: datetime) -> bool:
    return issued.revoked is None and issued.not_after >= now


def _nothing_to_revoke(who: str, found: list[Issued]) -> str:
    if not found:
        return f"{who[:80]!r} is neither a name nor a serial number here: `housecall ca list` shows all"
    last = found[-1]
    how = f"was revoked {last.revoked:%Y-%m-%d}" if last.revoked else f"ended {last.not_after:%Y-%m-%d}"
    return f"{who!r} has no certificate left to revoke: the last one {how}"
