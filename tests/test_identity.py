"""Identities: what the authority signs and refuses, who gets in over gRPC, what revocation is not made to forget."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import socket
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

import grpc
import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from typer.testing import CliRunner

from housecall.cli.ca import ca as ca_app
from housecall.errors import IdentityError
from housecall.identity import enrolment, files
from housecall.identity.authority import Authority
from housecall.identity.certificate import (
    Identity,
    Principal,
    client_credentials,
    load_private_key,
    new_key,
    principal,
    principal_of,
    request_certificate,
    server_credentials,
    utc_now,
)
from housecall.identity.enrolment import EnrolmentServer, Failures, authority_url, fetch_crl, join, renew
from housecall.identity.invitation import Invitation
from housecall.identity.keeper import Keeper
from housecall.identity.names import AUTHORITY, AUTHORITY_HOST, check_hosts, check_name, check_role, target
from housecall.identity.revocation import Crl, Revocations, read_crl, watch

HOSTS = ("localhost", "127.0.0.1")
PEM = serialization.Encoding.PEM


class Clock:
    """A time that passes when it is told to: now, unless told otherwise."""

    def __init__(self) -> None:
        self.time = utc_now()
        self.seconds = 0.0

    def __call__(self) -> datetime:
        return self.time

    def monotonic(self) -> float:
        return self.seconds

    def skip(self, **parts: float) -> None:
        self.time += timedelta(**parts)
        self.seconds += timedelta(**parts).total_seconds()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def authority(tmp_path: Path, clock: Clock) -> Authority:
    return Authority.create(tmp_path / "ca", "fed", now=clock)


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    """Another authority that calls itself the same."""
    return Authority.create(tmp_path / "stranger", "fed")


def csr(name: str = "anyone") -> bytes:
    return request_certificate(new_key(), name)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def parsed(authority: Authority) -> x509.Certificate:
    return x509.load_pem_x509_certificate(authority.ca)


# -- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "clinic", "Clinic-7", "a.b_c-d", "0", "x" * 63])
def test_a_name(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "x" * 64, "a b", "-a", "a-", ".", "..", "a/b", "a\n", "\na", "ä", "a\x00b", "a:b", "*", "a'b", "_a"]
)
def test_no_name(name: str, authority: Authority) -> None:
    for refused in (
        lambda: check_name(name),
        lambda: authority.issue(csr(), name, "worker"),
        lambda: authority.invite(name, "worker"),
        lambda: authority.identity(name, "worker"),
    ):
        with pytest.raises(IdentityError, match="is no name: it has 1 to 63 letters"):
            refused()
    assert authority.issued() == authority.invited() == ()


@pytest.mark.parametrize("role", ["", "admin", "Worker", "worker/clinic", AUTHORITY])
def test_no_role(role: str, authority: Authority) -> None:
    for refused in (
        lambda: check_role(role),
        lambda: authority.issue(csr(), "a", role),
        lambda: authority.invite("a", role),
    ):
        with pytest.raises(IdentityError, match="is no role: expected worker or scientist"):
            refused()


def test_hosts_are_written_one_way() -> None:
    hosts = ["Clinic.Example", "10.0.0.7", "0::1", "::1", "clinic.example", "localhost"]
    assert check_hosts(hosts, "worker") == ("clinic.example", "10.0.0.7", "::1", "localhost")


@pytest.mark.parametrize(
    "host",
    ["", "*", "*.example", "a b", "-a", "a..b", "a.", "a:1", "1.2.3", "256.1.1.1", "x" * 64, "ä.example", "a\n",
     "http://a", AUTHORITY_HOST, "x.invalid", "X.INVALID", "a_b", ".".join(["abc"] * 64)],
)  # fmt: skip
def test_no_host(host: str, authority: Authority) -> None:
    for refused in (
        lambda: authority.issue(csr(), "a", "worker", [host]),
        lambda: authority.invite("a", "worker", [host]),
    ):
        with pytest.raises(IdentityError, match="is no host: expected a DNS name without wildcards"):
            refused()


def test_hosts_are_few_and_workers_only(authority: Authority) -> None:
    with pytest.raises(IdentityError, match="33 hosts for one certificate, at most 32"):
        authority.issue(csr(), "a", "worker", [f"h{i}" for i in range(33)])
    with pytest.raises(IdentityError, match="a scientist serves nobody"):
        authority.issue(csr(), "a", "scientist", ["localhost"])


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("ca.example:7440", "ca.example:7440"),
        ("grpcs://ca:1", "ca:1"),
        ("[::1]:7440", "[::1]:7440"),
        ("1.2.3.4:0", "1.2.3.4:0"),
    ],
)
def test_an_address(url: str, expected: str) -> None:
    assert target(url) == expected


@pytest.mark.parametrize(
    "url",
    ["", "ca", "ca:", "ca:99999", ":1", "grpc://ca:1", "https://ca:1", "unix:/tmp/x", "dns:///ca:1", "ca:1/x", "a,b:1"],
)
def test_no_address(url: str) -> None:
    with pytest.raises(IdentityError, match="is no address of an authority: expected HOST:PORT"):
        target(url)


# -- certificates -------------------------------------------------------------------------------------------


def test_the_authority_says_that_it_is_one(authority: Authority) -> None:
    ca = parsed(authority)
    constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert usage.value.crl_sign
    assert not usage.value.digital_signature
    ca.verify_directly_issued_by(ca)


@pytest.mark.parametrize(
    ("role", "hosts", "purposes"),
    [
        ("worker", HOSTS, {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}),
        ("scientist", (), {ExtendedKeyUsageOID.CLIENT_AUTH}),
    ],
)
def test_what_a_certificate_says(
    authority: Authority, role: str, hosts: tuple[str, ...], purposes: set[object]
) -> None:
    made = authority.identity("clinic", role, hosts).parsed
    assert [name.rfc4514_string() for name in made.subject] == ["CN=clinic"]
    constraints = made.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert not constraints.value.ca
    usage = made.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.digital_signature
    assert not usage.value.key_cert_sign
    assert set(made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == purposes
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"housecall:{role}/clinic"]
    assert names.get_values_for_type(x509.DNSName) == [host for host in hosts if host == "localhost"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == [h for h in hosts if h == "127.0.0.1"]


def test_another_library_verifies_the_chain(authority: Authority) -> None:
    """RFC 5280 and the CA/B profile as `cryptography` has them, written by none of us."""
    worker, scientist = authority.identity("clinic", "worker", HOSTS), authority.identity("alice", "scientist")
    policy = verification.PolicyBuilder().store(verification.Store([parsed(authority)]))
    policy.build_server_verifier(x509.DNSName("localhost")).verify(worker.parsed, [])
    policy.build_client_verifier().verify(worker.parsed, [])
    policy.build_client_verifier().verify(scientist.parsed, [])
    with pytest.raises(verification.VerificationError):
        policy.build_server_verifier(x509.DNSName("elsewhere")).verify(worker.parsed, [])
    with pytest.raises(verification.VerificationError):
        policy.build_client_verifier().verify(authority.server_identity().parsed, [])


def test_a_member_may_be_called_as_the_authority_is(authority: Authority) -> None:
    made = authority.identity("fed", "worker")
    assert made.parsed.subject != made.parsed.issuer
    assert Identity.parse(made.key + made.certificate + made.ca) == made


def test_dates(authority: Authority, clock: Clock) -> None:
    made = authority.identity("clinic", "worker", lifetime=timedelta(days=3))
    now = clock.time.replace(microsecond=0)
    assert made.not_after == now + timedelta(days=3)
    assert made.not_before == now - timedelta(minutes=5)
    assert made.renews_at == made.not_before + (made.not_after - made.not_before) * 2 / 3
    clock.skip(days=3649)
    assert authority.identity("clinic", "worker").not_after == parsed(authority).not_valid_after_utc
    clock.skip(days=2)
    with pytest.raises(IdentityError, match="the authority 'fed' itself is valid from"):
        authority.identity("clinic", "worker")
    clock.skip(days=-3700)
    with pytest.raises(IdentityError, match="mend the clock"):
        authority.identity("clinic", "worker")


@pytest.mark.parametrize("days", [0, -1, 91])
def test_no_lifetime(authority: Authority, days: int) -> None:
    with pytest.raises(IdentityError, match="a certificate lives for up to 90 days"):
        authority.issue(csr(), "a", "worker", lifetime=timedelta(days=days))


def test_what_a_request_asks_for_is_not_read(authority: Authority) -> None:
    key = new_key()
    greedy = (
        x509.CertificateSigningRequestBuilder(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fed"), x509.NameAttribute(NameOID.COMMON_NAME, "root")])
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(AUTHORITY_HOST), x509.DNSName("*")]), critical=False)
        .sign(load_private_key(key), hashes.SHA256())
    )
    made = Identity(key, authority.issue(greedy.public_bytes(PEM), "alice", "scientist"), authority.ca)
    assert (made.name, made.role) == ("alice", "scientist")
    assert not made.parsed.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    names = made.parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in names] == ["housecall:scientist/alice"]


def signed_by_another() -> bytes:
    """A request whose signature is another key's: its last bytes are changed."""
    der = x509.load_pem_x509_csr(csr()).public_bytes(serialization.Encoding.DER)
    for place in range(1, 20):
        bent = bytearray(der)
        bent[-place] ^= 1
        try:
            request = x509.load_der_x509_csr(bytes(bent))
            if not request.is_signature_valid:
                return request.public_bytes(PEM)
        except ValueError:
            continue
    raise AssertionError


def of_key(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return x509.CertificateSigningRequestBuilder(x509.Name([])).sign(key, hashes.SHA256()).public_bytes(PEM)


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (signed_by_another, "is not signed with its own key"),
        (lambda: of_key(rsa.generate_private_key(65537, 1024)), "a key of another kind; expected elliptic curve P-256"),
        (lambda: of_key(ec.generate_private_key(ec.SECP384R1())), "a key of another kind"),
        (lambda: of_key(ec.generate_private_key(ec.SECP256K1())), "a key of another kind"),
        (lambda: b"", "is damaged"),
        (lambda: b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", "is damaged"),
        (lambda: csr()[:200], "is damaged"),
        (lambda: csr() + b" " * 20_000, "at most 16384 bytes"),
        (new_key, "is damaged"),
    ],
)
def test_an_unfit_request_is_refused(authority: Authority, request_: Callable[[], bytes], why: str) -> None:
    with pytest.raises(IdentityError, match=why):
        authority.issue(request_(), "alice", "scientist")
    assert authority.issued() == ()


def test_a_request_with_an_rsa_key_of_512_bits_is_refused(authority: Authority) -> None:
    """Made by openssl, since `cryptography` makes none so weak."""
    with pytest.raises(IdentityError, match="signing request"):
        authority.issue(RSA_512, "alice", "scientist")


RSA_512 = b"""\
-----BEGIN CERTIFICATE REQUEST-----
MIHJMHUCAQAwEDEOMAwGA1UEAwwFYWxpY2UwXDANBgkqhkiG9w0BAQEFAANLADBI
AkEAtUf4AhC0iEkZzoEX8RF1GJHshsDiu6owavlOoEjbreEgs6IqwDE7TK/1bEr5
l/wpfLl1xXN0oZTjivnR+OofrQIDAQABoAAwDQYJKoZIhvcNAQELBQADQQCMk5uG
bzyLbo+L/gWWw/y1MrHjLy6MuM780bva4eiNnEmdKp+D08086sTgVltojp642I44
8HXuWbgobmAQF5uL
-----END CERTIFICATE REQUEST-----
"""


def of_der(der: bytes, kind: str) -> bytes:
    return f"-----BEGIN {kind}-----\n{base64.b64encode(der).decode()}\n-----END {kind}-----\n".encode()


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")  # of a negative serial number
@pytest.mark.parametrize("kind", ["certificate", "request", "list", "key"])
def test_damage_of_any_kind_is_one_error(authority: Authority, kind: str) -> None:
    made = authority.identity("clinic", "worker", HOSTS)
    authority.revoke("clinic")
    label, pem, read_it = {
        "certificate": ("CERTIFICATE", made.certificate, lambda pem: Identity(made.key, pem, made.ca)),
        "request": ("CERTIFICATE REQUEST", csr(), lambda pem: authority.issue(pem, "a", "worker")),
        "list": ("X509 CRL", authority.crl(), lambda pem: read_crl(pem, parsed(authority))),
        "key": ("PRIVATE KEY", made.key, lambda pem: Identity(pem, made.certificate, made.ca)),
    }[kind]
    der = base64.b64decode(b"".join(pem.splitlines()[1:-1]))
    random, refusals = Random(0), 0
    for _ in range(500):
        bytes_ = bytearray(der)
        bytes_[random.randrange(len(der))] ^= 1 << random.randrange(8)
        try:
            read_it(of_der(bytes(bytes_), label))
        except IdentityError:
            refusals += 1
    assert refusals >= 490  # some bytes of a key say nothing about the key


# -- identities at rest -------------------------------------------------------------------------------------


def test_an_identity_is_saved_and_loaded(authority: Authority, tmp_path: Path) -> None:
    made = authority.identity("alice", "scientist")
    folder = made.save(tmp_path / "deep" / "alice").parent
    file = made.save(tmp_path / "alice.pem")
    assert Identity.load(folder) == Identity.load(str(file)) == made
    assert mode(folder / "identity.pem") == mode(file) == 0o600
    assert mode(folder) == 0o700
    assert [path.name for path in folder.iterdir()] == ["identity.pem"]


def test_saving_again_mends_the_mode(authority: Authority, tmp_path: Path) -> None:
    path = authority.identity("alice", "scientist").save(tmp_path / "alice.pem")
    path.chmod(0o644)
    authority.identity("alice", "scientist").save(path)
    assert mode(path) == 0o600


@pytest.mark.parametrize("open_to", [0o640, 0o604, 0o620, 0o601, 0o644])
def test_a_key_that_others_may_touch_is_refused(authority: Authority, tmp_path: Path, open_to: int) -> None:
    path = authority.identity("alice", "scientist").save(tmp_path)
    path.chmod(open_to)
    with pytest.raises(IdentityError, match=rf"others may touch it \(mode {open_to:04o}, expected 0600\).*chmod 600"):
        Identity.load(tmp_path)
    (authority.folder / "ca.key").chmod(open_to)
    with pytest.raises(IdentityError, match="others may touch it"):
        Authority.load(authority.folder)


def test_what_the_authority_keeps_is_its_own(authority: Authority) -> None:
    authority.invite("alice", "scientist")
    modes = {path.name: mode(path) for path in authority.folder.iterdir()}
    assert modes == {"ca.key": 0o600, "ca.pem": 0o644, "crl.pem": 0o644, "index.json": 0o600, ".lock": 0o600}
    assert mode(authority.folder) == 0o700


def test_the_key_is_never_shown(authority: Authority) -> None:
    made = authority.identity("alice", "scientist")
    assert re.fullmatch(
        r"<Identity scientist 'alice', serial [0-9a-f]+, until \d{4}-\d\d-\d\d \d\d:\d\d UTC>", repr(made)
    )
    assert "secret" not in repr(authority.invite("bob", "scientist"))


def test_parts_that_do_not_belong_together(authority: Authority, stranger: Authority) -> None:
    made, other = authority.identity("alice", "scientist"), authority.identity("alice", "scientist")
    with pytest.raises(IdentityError, match="belongs to another key"):
        Identity(other.key, made.certificate, made.ca)
    with pytest.raises(IdentityError, match="not signed by the authority beside it"):
        Identity(made.key, made.certificate, stranger.ca)
    with pytest.raises(IdentityError, match="is no authority's"):
        Identity(made.key, made.certificate, other.certificate)
    with pytest.raises(IdentityError, match="certificate is damaged"):
        Identity(made.key, made.certificate[:100], made.ca)


def key_pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, password: bytes = b"") -> bytes:
    lock = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, lock)


def test_keys_of_other_kinds(authority: Authority) -> None:
    made = authority.identity("alice", "scientist")
    for key, why in [
        (key_pem(ec.generate_private_key(ec.SECP256R1()), b"pass"), "locked with a password"),
        (key_pem(rsa.generate_private_key(65537, 1024)), "expected elliptic curve P-256"),
        (key_pem(ec.generate_private_key(ec.SECP384R1())), "expected elliptic curve P-256"),
        (made.key[:60] + made.key[70:], "private key is damaged"),
    ]:
        with pytest.raises(IdentityError, match=why):
            Identity(key, made.certificate, made.ca)


def test_files_that_are_no_identity(authority: Authority, tmp_path: Path) -> None:
    made = authority.identity("alice", "scientist")
    path = tmp_path / "x.pem"
    for text, why in [
        (b"", "found 0 private keys and 0 certificates"),
        (made.certificate + made.ca, "found 0 private keys and 2 certificates"),
        (made.key + made.certificate, "found 1 private keys and 1 certificates"),
        (made.key * 2 + made.certificate + made.ca, "found 2 private keys"),
        (made.key + made.certificate + made.ca + b" " * (1 << 16), "more than 65536 bytes"),
    ]:
        files.replace(path, text, private=True)
        with pytest.raises(IdentityError, match=f"no identity from .*x.pem: .*{why}"):
            Identity.load(path)
    with pytest.raises(IdentityError, match="cannot be read: No such file"):
        Identity.load(tmp_path / "nowhere")
    files.replace(path, b"note\n" + made.ca + made.certificate + made.key, private=True)
    assert Identity.load(path) == made  # in any order


def test_an_authority_is_not_made_over_another(authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="holds an authority already"):
        Authority.create(authority.folder, "other")
    with pytest.raises(IdentityError, match=r"holds no authority: `housecall ca init .*` makes one"):
        Authority.load(tmp_path / "nowhere")
    assert Authority.load(authority.folder).ca == authority.ca


def test_a_damaged_authority_is_not_loaded(authority: Authority, stranger: Authority) -> None:
    index = authority.folder / "index.json"
    sound = index.read_bytes()
    for damage in (b"", sound[:-5], sound.replace(b'"url"', b'"uri"'), b"\xff" * 9, sound.replace(b": 1,", b": 2,", 1)):
        index.write_bytes(damage)
        with pytest.raises(IdentityError, match=r"index.json (is damaged|has version 2)"):
            Authority.load(authority.folder)
    index.unlink()
    with pytest.raises(IdentityError, match=r"index.json cannot be read"):
        Authority.load(authority.folder)
    index.write_bytes(sound)
    (authority.folder / "ca.pem").write_bytes(stranger.ca)
    with pytest.raises(IdentityError, match="does not belong to"):
        Authority.load(authority.folder)


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.replace(path, b"before")

    def fail(handle: int) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk is full"):
        files.replace(path, b"after")
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"before"


# -- invitations --------------------------------------------------------------------------------------------


def test_an_invitation_travels_as_text(authority: Authority, tmp_path: Path) -> None:
    made = authority.invite("clinic", "worker", HOSTS, url="ca.example:7440")
    assert Invitation.parse(made.text()) == made
    made.save(tmp_path / "clinic.invitation")
    assert mode(tmp_path / "clinic.invitation") == 0o600
    assert Invitation.load(tmp_path / "clinic.invitation") == made
    assert made.ca.encode() == authority.ca
    assert len(made.secret) >= 43  # 256 bits


def test_only_a_hash_of_the_secret_is_kept(authority: Authority) -> None:
    made = authority.invite("clinic", "worker")
    stored = b"".join(path.read_bytes() for path in authority.folder.iterdir())
    assert made.secret.encode() not in stored
    assert authority.invite("other", "worker").secret != made.secret


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('name = "clinic"', 'name = "../clinic"'),
        ('role = "worker"', 'role = "authority"'),
        ('role = "worker"', 'role = "worker"\nmore = 1'),
        ('url = "ca:1"', 'url = "unix:/tmp/x"'),
        ("BEGIN CERTIFICATE", "BEGIN NOTHING"),
        ('    "localhost",', '    "*.example",'),
        ("secret = ", "# "),
        ("expires = ", "expires = 1 # "),
        ("+00:00", ""),
        ("=", "?"),
    ],
)
def test_no_invitation(authority: Authority, old: str, new: str) -> None:
    text = authority.invite("clinic", "worker", HOSTS, url="ca:1").text()
    assert old in text
    with pytest.raises(IdentityError):
        Invitation.parse(text.replace(old, new))


def test_an_invitation_is_used_once(authority: Authority, clock: Clock) -> None:
    made = authority.invite("clinic", "worker", HOSTS)
    key = new_key()
    identity = Identity(key, authority.redeem(made.secret, request_certificate(key, "someone-else")), authority.ca)
    assert (identity.name, identity.role) == ("clinic", "worker")
    assert authority.issued()[0].hosts == HOSTS
    with pytest.raises(
        IdentityError, match=r"the invitation of worker 'clinic' was used .* tell the authority's owner"
    ):
        authority.redeem(made.secret, csr())
    assert len(authority.issued()) == 1


def test_of_many_who_hold_it_one_gets_in(authority: Authority) -> None:
    secret = authority.invite("clinic", "worker").secret
    start = threading.Barrier(8)

    def attempt(_: int) -> bool:
        own = Authority.load(authority.folder)
        request = csr()
        start.wait(30)
        try:
            own.redeem(secret, request)
        except IdentityError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(attempt, range(8))) == [False] * 7 + [True]
    assert len(authority.issued()) == 1


REDEEM = """
import sys
from housecall.errors import IdentityError
from housecall.identity.authority import Authority
from housecall.identity.certificate import new_key, request_certificate
own, request = Authority.load(sys.argv[1]), request_certificate(new_key(), "x")
print("ready", flush=True)
sys.stdin.readline()
try:
    own.redeem(sys.argv[2], request)
    print("in")
except IdentityError as error:
    print("out" if "was used" in str(error) else error)
"""


def test_of_several_processes_one_gets_in(authority: Authority) -> None:
    secret = authority.invite("clinic", "worker").secret
    command = [sys.executable, "-W", "error", "-c", REDEEM, str(authority.folder), secret]
    rivals = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for rival in rivals:
        assert rival.stdout is not None
        assert rival.stdout.readline() == "ready\n"
    assert rivals[0].stdin is not None
    for rival in rivals:
        assert rival.stdin is not None
        rival.stdin.write("go\n")
        rival.stdin.flush()
    assert sorted(rival.communicate(timeout=60)[0].strip() for rival in rivals) == ["in", "out", "out"]


def test_an_invitation_ends(authority: Authority, clock: Clock) -> None:
    made = authority.invite("clinic", "worker", lifetime=timedelta(hours=2))
    clock.skip(hours=2, seconds=2)
    with pytest.raises(IdentityError, match="the invitation of worker 'clinic' ended"):
        authority.redeem(made.secret, csr())
    last = authority.invite("clinic", "worker", lifetime=timedelta(hours=2))
    clock.skip(hours=1)
    assert authority.redeem(last.secret, csr())


@pytest.mark.parametrize("lifetime", [timedelta(), timedelta(days=366), timedelta.max])
def test_no_time_for_an_invitation(authority: Authority, lifetime: timedelta) -> None:
    with pytest.raises(IdentityError, match="an invitation lasts for up to 365 days"):
        authority.invite("a", "worker", lifetime=lifetime)


@pytest.mark.parametrize("secret", ["", "guess", "ä", "x" * 10_000])
def test_a_guess_is_refused(authority: Authority, secret: str) -> None:
    authority.invite("clinic", "worker")
    with pytest.raises(IdentityError, match="no invitation has this secret"):
        authority.redeem(secret, csr())


def test_the_hash_is_no_secret(authority: Authority) -> None:
    authority.invite("clinic", "worker")
    with pytest.raises(IdentityError, match="no invitation has this secret"):
        authority.redeem(authority.invited()[0].digest, csr())


def test_an_unfit_request_leaves_the_invitation_unused(authority: Authority) -> None:
    secret = authority.invite("clinic", "worker").secret
    with pytest.raises(IdentityError, match="not signed with its own key"):
        authority.redeem(secret, signed_by_another())
    assert authority.redeem(secret, csr())


def test_a_name_has_one_holder(authority: Authority, clock: Clock) -> None:
    first = authority.invite("alice", "scientist")
    second = authority.invite("alice", "scientist")
    with pytest.raises(IdentityError, match="was withdrawn"):
        authority.redeem(first.secret, csr())
    authority.redeem(second.secret, csr())
    with pytest.raises(IdentityError, match=r"'alice' has a certificate until .*: revoke it first"):
        authority.invite("alice", "worker")
    clock.skip(days=8)
    assert authority.invite("alice", "scientist")


# -- revocation ---------------------------------------------------------------------------------------------


def test_revoking_a_name_ends_all_of_it(authority: Authority) -> None:
    mine = [authority.identity("alice", "scientist") for _ in range(2)]
    other = authority.identity("bob", "scientist")
    assert {f"{identity.serial:x}" for identity in mine} == {issued.serial for issued in authority.revoke("alice")}
    crl = read_crl(authority.crl(), parsed(authority))
    assert crl.serials == {identity.serial for identity in mine}
    for identity in mine:
        with pytest.raises(IdentityError, match="the certificate of scientist 'alice' is revoked"):
            authority.renew(identity.serial, csr())
    assert authority.renew(other.serial, csr())
    with pytest.raises(IdentityError, match="'alice' has no certificate left to revoke: the last one was revoked"):
        authority.revoke("alice")


def test_revoking_a_serial_ends_that_one(authority: Authority) -> None:
    first, second = (authority.identity("alice", "scientist") for _ in range(2))
    authority.revoke(f"{first.serial:X}")
    assert read_crl(authority.crl(), parsed(authority)).serials == {first.serial}
    assert authority.renew(second.serial, csr())


def test_revoking_a_name_withdraws_its_invitation(authority: Authority) -> None:
    secret = authority.invite("alice", "scientist").secret
    assert authority.revoke("alice") == ()
    with pytest.raises(IdentityError, match="was withdrawn"):
        authority.redeem(secret, csr())
    with pytest.raises(IdentityError, match="neither a name nor a serial number here"):
        authority.revoke("nobody")


def test_the_authoritys_own_server_can_be_revoked_by_serial_only(authority: Authority) -> None:
    own, alike = authority.server_identity(), authority.identity("fed", "worker")
    assert [issued.serial for issued in authority.revoke("fed")] == [f"{alike.serial:x}"]
    assert [issued.serial for issued in authority.revoke(f"{own.serial:x}")] == [f"{own.serial:x}"]


def test_the_list_is_renewed(authority: Authority, clock: Clock) -> None:
    alice = authority.identity("alice", "scientist")
    authority.revoke("alice")
    first = authority.crl()
    assert authority.crl() == first == (authority.folder / "crl.pem").read_bytes()
    clock.skip(days=1, seconds=1)
    second = read_crl(authority.crl(), parsed(authority))
    assert second.number == read_crl(first, parsed(authority)).number + 1
    assert second.serials == {alice.serial}
    assert second.next_update == second.last_update + timedelta(days=7)
    clock.skip(days=8)
    assert read_crl(authority.crl(), parsed(authority)).serials == set()  # it has ended by itself


def test_a_lost_or_old_list_is_made_anew(authority: Authority) -> None:
    path = authority.folder / "crl.pem"
    before = path.read_bytes()
    alice = authority.identity("alice", "scientist")
    authority.revoke("alice")
    for damage in (before, b"", None):  # as after a crash between the index and the list; damaged; gone
        path.write_bytes(damage) if damage is not None else path.unlink()
        assert read_crl(authority.crl(), parsed(authority)).serials == {alice.serial}


@pytest.fixture
def listed(authority: Authority, clock: Clock) -> tuple[Revocations, Path]:
    path = authority.folder / "crl.pem"
    return Revocations(path, authority.ca, now=clock), path


def test_revocation_takes_effect_without_restart(authority: Authority, listed: tuple[Revocations, Path]) -> None:
    revocations, _ = listed
    alice, bob = authority.identity("alice", "scientist"), authority.identity("bob", "scientist")
    assert not revocations.revoked(alice.serial)
    authority.revoke("alice")
    assert not revocations.revoked(alice.serial)  # who asks does not look
    revocations.look()
    assert revocations.revoked(alice.serial)
    assert not revocations.revoked(bob.serial)


def long_list(authority: Authority, count: int) -> bytes:
    """A list of the authority's with so many numbers, the last of them `count`."""
    key = load_private_key((authority.folder / "ca.key").read_bytes())
    now = utc_now()
    revoked = [x509.RevokedCertificateBuilder(number, now).build() for number in range(1, count + 1)]
    dates = now, now + timedelta(days=7)
    made = x509.CertificateRevocationListBuilder(parsed(authority).subject, *dates, [], revoked)
    return made.add_extension(x509.CRLNumber(1000 + count), critical=False).sign(key, hashes.SHA256()).public_bytes(PEM)


def test_a_long_list_is_read_once_for_each_change(
    authority: Authority, listed: tuple[Revocations, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    revocations, path = listed
    reads = []

    def counted(pem: bytes, ca: x509.Certificate) -> Crl:
        reads.append(len(pem))
        return read_crl(pem, ca)

    monkeypatch.setattr("housecall.identity.revocation.read_crl", counted)
    for count in (100_000, 100_001):
        files.replace(path, long_list(authority, count))
        for _ in range(5):
            revocations.look()
            assert revocations.revoked(count)
            assert not revocations.revoked(count + 1)
    assert len(reads) == 2
    assert min(reads) > 2_000_000


def test_the_watch_goes_on_whatever_happens(
    listed: tuple[Revocations, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    revocations, path = listed
    looks, stop = [], threading.Event()

    def fail() -> None:
        looks.append(True)
        if len(looks) == 3:
            stop.set()
        raise MemoryError

    monkeypatch.setattr(revocations, "look", fail)
    watch([revocations], stop, every=0.001)
    assert len(looks) == 3
    assert f"the revocation list {path} could not be looked at; it is tried again" in caplog.text


def bent(pem: bytes) -> bytes:
    """The list with one more serial number than was signed, or one changed."""
    der = bytearray(x509.load_pem_x509_crl(pem).public_bytes(serialization.Encoding.DER))
    place = der.index(x509.load_pem_x509_crl(pem)[0].serial_number.to_bytes(20, "big").lstrip(b"\0"))
    der[place + 5] ^= 1
    return x509.load_der_x509_crl(bytes(der)).public_bytes(PEM)


@pytest.mark.parametrize("harm", ["gone", "empty", "cut", "bent", "stranger", "older", "text"])
def test_a_list_that_cannot_be_believed_changes_nothing(
    authority: Authority,
    stranger: Authority,
    listed: tuple[Revocations, Path],
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    harm: str,
) -> None:
    revocations, path = listed
    first = path.read_bytes()
    alice = authority.identity("alice", "scientist")
    authority.revoke("alice")
    revocations.look()
    assert revocations.revoked(alice.serial)
    sound = path.read_bytes()
    bad = {
        "empty": b"",
        "cut": sound[:-60],
        "bent": bent(sound),
        "stranger": stranger.crl(),
        "older": first,
        "text": b"\xff",
    }
    path.unlink() if harm == "gone" else files.replace(path, bad[harm])
    caplog.clear()
    for _ in range(3):
        revocations.look()
        assert revocations.revoked(alice.serial)
    assert len(caplog.records) == 1  # said once, not at every look
    assert "stays in force" in caplog.text
    bob = authority.identity("bob", "scientist")
    authority.revoke("bob")
    revocations.look()
    assert revocations.revoked(bob.serial)
    assert revocations.revoked(alice.serial)


def test_at_the_start_there_is_a_sound_list_or_none(
    authority: Authority, stranger: Authority, clock: Clock, tmp_path: Path
) -> None:
    path = tmp_path / "crl.pem"
    revocations = Revocations(path, authority.ca)
    alice = authority.identity("alice", "scientist")
    authority.revoke("alice")
    revocations.look()
    assert not revocations.revoked(alice.serial)
    path.write_bytes(authority.crl())
    revocations.look()
    assert revocations.revoked(alice.serial)
    for bad in (b"", stranger.crl(), bent(authority.crl())):
        path.write_bytes(bad)
        with pytest.raises(IdentityError, match=r"crl.pem: the revocation list"):
            Revocations(path, authority.ca)


def test_an_outdated_list_is_kept_and_told(
    authority: Authority, listed: tuple[Revocations, Path], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    revocations, _ = listed
    alice = authority.identity("alice", "scientist")
    authority.revoke("alice")
    revocations.look()
    assert revocations.revoked(alice.serial)
    for _ in range(3):
        clock.skip(days=8)
        revocations.look()
        assert revocations.revoked(alice.serial)
    assert len(caplog.records) == 1
    assert "was good until" in caplog.text


# -- who gets in, over gRPC ---------------------------------------------------------------------------------


@contextmanager
def served(source: Callable[[], Identity]) -> Iterator[int]:
    """A server on loopback that says who calls, or why it does not know."""

    def who(body: bytes, context: grpc.ServicerContext) -> bytes:
        found = principal(context.auth_context(), utc_now())  # type: ignore[arg-type]  # the stubs have one value each
        return msgspec.msgpack.encode([found.name, found.role, f"{found.serial:x}"])

    server = grpc.server(ThreadPoolExecutor(2))
    method = grpc.unary_unary_rpc_method_handler(who)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Test", {"Who": method}),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(source))
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


def ask(port: int, credentials: grpc.ChannelCredentials, host: str = "127.0.0.1") -> tuple[str, str, str]:
    with grpc.secure_channel(f"{host}:{port}", credentials) as channel:
        found = msgspec.msgpack.decode(channel.unary_unary("/Test/Who")(b"", timeout=30))
    return tuple(found)


def refused(port: int, credentials: grpc.ChannelCredentials, host: str = "127.0.0.1") -> bool:
    with pytest.raises(grpc.RpcError) as caught:
        ask(port, credentials, host)
    return caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_the_server_knows_who_calls(authority: Authority) -> None:
    clinic = authority.identity("clinic", "worker", HOSTS)
    alice = authority.identity("alice", "scientist")
    with served(lambda: clinic) as port:
        assert ask(port, client_credentials(alice)) == ("alice", "scientist", f"{alice.serial:x}")
        assert ask(port, client_credentials(alice), "localhost") == ("alice", "scientist", f"{alice.serial:x}")
        assert ask(port, client_credentials(clinic)) == ("clinic", "worker", f"{clinic.serial:x}")


def test_who_does_not_get_in(authority: Authority, stranger: Authority, clock: Clock) -> None:
    clinic = authority.identity("clinic", "worker", HOSTS)
    eve = stranger.identity("alice", "scientist")
    clock.skip(minutes=-4)
    over = authority.identity("alice", "scientist", lifetime=timedelta(minutes=1))
    server_only = authority.server_identity()
    with served(lambda: clinic) as port:
        assert refused(port, grpc.ssl_channel_credentials(authority.ca))  # no certificate
        assert refused(port, grpc.ssl_channel_credentials(authority.ca, eve.key, eve.certificate))
        assert refused(port, client_credentials(over))
        assert refused(port, client_credentials(server_only))
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError):
            channel.unary_unary("/Test/Who")(b"", timeout=30)


def test_whom_a_client_does_not_trust(authority: Authority, stranger: Authority, clock: Clock) -> None:
    alice = client_credentials(authority.identity("alice", "scientist"))
    elsewhere = authority.identity("clinic", "worker", ["clinic.example"])
    scientist = authority.identity("bob", "scientist")
    clock.skip(minutes=-4)
    over = authority.identity("clinic", "worker", HOSTS, timedelta(minutes=1))
    for impostor in (stranger.identity("clinic", "worker", HOSTS), elsewhere, scientist, over):
        with served(lambda identity=impostor: identity) as port:
            assert refused(port, alice)


def seen_by_client(port: int, identity: Identity, folder: Path) -> int:
    """The serial number of the certificate that a server shows, by Python's own TLS."""
    context = ssl.create_default_context(cadata=identity.ca.decode())
    context.load_cert_chain(identity.save(folder / "client.pem"))
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=30) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as wrapped,
    ):
        shown = wrapped.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).serial_number


def test_a_renewed_certificate_is_shown_without_restart(
    authority: Authority, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = (authority.identity("clinic", "worker", HOSTS) for _ in range(2))
    alice = authority.identity("alice", "scientist")
    held: list[Identity] = [first]
    with served(lambda: held[0]) as port:
        assert seen_by_client(port, alice, tmp_path) == first.serial
        held[0] = second
        assert seen_by_client(port, alice, tmp_path) == second.serial
        assert seen_by_client(port, alice, tmp_path) == second.serial
        held.clear()  # the source fails
        assert seen_by_client(port, alice, tmp_path) == second.serial
        assert ask(port, client_credentials(alice))[0] == "alice"


def test_a_principal_needs_a_certificate(authority: Authority, clock: Clock) -> None:
    alice = authority.identity("alice", "scientist")
    sound = {"transport_security_type": [b"ssl"], "x509_pem_cert": [alice.certificate]}
    assert principal(sound) == alice.principal == Principal("alice", "scientist", alice.serial, alice.not_after)
    assert str(principal(sound)) == "scientist 'alice'"
    for context in (
        {},
        {"transport_security_type": [b"ssl"]},
        {"x509_pem_cert": [alice.certificate]},
        {**sound, "transport_security_type": [b"local"]},
        {**sound, "x509_pem_cert": [alice.certificate] * 2},
    ):
        with pytest.raises(IdentityError, match="the caller showed no certificate: connect with grpcs://"):
            principal(context)
    assert principal(sound, clock.time)
    with pytest.raises(IdentityError, match="the certificate of scientist 'alice' ended"):
        principal(sound, clock.time + timedelta(days=7, seconds=1))


def certified(common: list[str], uris: list[str] | None) -> x509.Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, value) for value in common])
    builder = (
        x509.CertificateBuilder(name, name, key.public_key(), 1)
        .not_valid_before(datetime(2026, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2027, 1, 1, tzinfo=UTC))
    )
    if uris is not None:
        names = [x509.UniformResourceIdentifier(uri) for uri in uris]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(key, hashes.SHA256())


@pytest.mark.parametrize(
    ("common", "uris", "why"),
    [
        (["alice"], None, "names no principal"),
        (["alice"], [], "1 common names and 0 roles"),
        (["alice"], ["spiffe://x/alice"], "1 common names and 0 roles"),
        (["alice", "bob"], ["housecall:worker/alice"], "2 common names and 1 roles"),
        (["alice"], ["housecall:worker/alice", "housecall:scientist/alice"], "1 common names and 2 roles"),
        (["alice"], ["housecall:worker/bob"], "names both 'bob' and 'alice'|names both 'alice' and 'bob'"),
        (["alice"], ["housecall:admin/alice"], "'admin' is no role"),
        (["a b"], ["housecall:worker/a b"], "is no name"),
        (["alice"], ["housecall:alice"], "names both"),
    ],
)
def test_odd_certificates_name_nobody(common: list[str], uris: list[str] | None, why: str) -> None:
    with pytest.raises(IdentityError, match=why):
        principal_of(certified(common, uris))
    assert principal_of(certified(["alice"], ["housecall:worker/alice"])).role == "worker"


# -- enrolment over gRPC ------------------------------------------------------------------------------------


@pytest.fixture
def server(authority: Authority, clock: Clock) -> Iterator[EnrolmentServer]:
    with EnrolmentServer(authority, "127.0.0.1:0", failures=Failures(clock=clock.monotonic)) as server:
        yield server


def test_joining(authority: Authority, server: EnrolmentServer, tmp_path: Path) -> None:
    invitation = authority.invite("clinic", "worker", HOSTS, url=server.address)
    made = join(Invitation.parse(invitation.text()), tmp_path / "clinic")
    assert (made.name, made.role, made.ca) == ("clinic", "worker", authority.ca)
    assert Identity.load(tmp_path / "clinic") == made
    assert authority_url(tmp_path / "clinic") == server.address
    assert [issued.name for issued in authority.issued()] == ["fed", "clinic"]
    with served(lambda: made) as port:
        assert ask(port, client_credentials(made))[:2] == ("clinic", "worker")
    with pytest.raises(IdentityError, match="refused: the invitation of worker 'clinic' was used"):
        join(invitation, tmp_path / "again")
    assert not (tmp_path / "again" / "identity.pem").exists()


def test_joining_needs_a_place_and_an_address(authority: Authority, server: EnrolmentServer, tmp_path: Path) -> None:
    authority.identity("old", "scientist").save(tmp_path)
    invitation = authority.invite("alice", "scientist", url=server.address)
    with pytest.raises(IdentityError, match="holds an identity already"):
        join(invitation, tmp_path)
    with pytest.raises(IdentityError, match="does not say where the authority is"):
        join(authority.invite("bob", "scientist"), tmp_path / "bob")
    assert join(invitation, tmp_path / "alice").name == "alice"  # the secret was not spent


def test_nobody_can_pose_as_the_authority(
    authority: Authority, stranger: Authority, server: EnrolmentServer, tmp_path: Path
) -> None:
    """Neither another authority nor a member who serves where the authority is expected is told a secret."""
    impostor = pytest.raises(IdentityError, match="is not the authority that was expected there: nothing was sent")
    with EnrolmentServer(stranger, "127.0.0.1:0") as other, impostor:
        join(authority.invite("alice", "scientist", url=other.address), tmp_path / "alice")
    member = authority.identity("mallory", "worker", HOSTS)
    with EnrolmentServer(authority, "127.0.0.1:0") as posing, pytest.MonkeyPatch.context() as patch:
        assert fetch_crl(posing.address, authority.ca)
        patch.setattr(posing._own, "_identity", member)
        with pytest.raises(IdentityError, match="is not the authority that was expected there: nothing was sent"):
            join(authority.invite("alice", "scientist", url=posing.address), tmp_path / "alice")
    assert all(invited.used is None for invited in authority.invited())


def test_what_answers_must_be_what_was_asked_for(
    authority: Authority, server: EnrolmentServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation = authority.invite("alice", "scientist", url=server.address)
    monkeypatch.setattr(authority, "redeem", lambda secret, request: authority.issue(request, "bob", "scientist"))
    with pytest.raises(IdentityError, match=r"the authority made .*'bob'.*; the invitation was for .*'alice'"):
        join(invitation, tmp_path / "alice")
    monkeypatch.setattr(authority, "redeem", lambda secret, request: authority.issue(csr(), "alice", "scientist"))
    with pytest.raises(IdentityError, match="belongs to another key"):
        join(invitation, tmp_path / "alice")
    assert not (tmp_path / "alice" / "identity.pem").exists()


def test_no_answer(authority: Authority, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
    with pytest.raises(IdentityError, match=f"no answer from the authority at 127.0.0.1:{port}"):
        join(authority.invite("alice", "scientist", url=f"127.0.0.1:{port}"), tmp_path / "alice")


def test_a_port_has_one_server(authority: Authority, server: EnrolmentServer) -> None:
    with pytest.raises(IdentityError, match="cannot listen on"):
        EnrolmentServer(authority, server.address)


def test_renewing(authority: Authority, server: EnrolmentServer) -> None:
    old = authority.identity("clinic", "worker", HOSTS, timedelta(days=3))
    new = renew(old, server.address)
    assert (new.name, new.role) == ("clinic", "worker")
    assert new.serial != old.serial
    assert new.key != old.key
    first, second = (issued for issued in authority.issued() if issued.name == "clinic")
    assert (second.hosts, second.lifetime) == (first.hosts, first.lifetime) == (HOSTS, 3 * 86400)
    assert renew(new, server.address).name == "clinic"


def test_who_may_not_renew(authority: Authority, stranger: Authority, server: EnrolmentServer, clock: Clock) -> None:
    gone = authority.identity("gone", "scientist")
    authority.revoke("gone")
    with pytest.raises(IdentityError, match="refused: the certificate of scientist 'gone' is revoked"):
        renew(gone, server.address)
    foreign = stranger.identity("alice", "scientist")
    with pytest.raises(IdentityError, match="is not the authority that was expected there"):
        renew(foreign, server.address)
    own = authority.server_identity()
    with pytest.raises(IdentityError, match=r"no certificate with serial .* can be renewed"):
        renew(own, server.address)
    over = authority.identity("over", "scientist")
    clock.skip(days=7, seconds=2)
    with pytest.raises(IdentityError, match=r"the certificate of scientist 'over' ended .*: ask for a new invitation"):
        renew(over, server.address)
    with pytest.raises(IdentityError, match="nobody said where the authority"):
        renew(over, "")


def sent(server: EnrolmentServer, ca: bytes, method: str, body: bytes) -> grpc.StatusCode:
    """The code of the answer to a message that no honest client would send."""
    options = [("grpc.ssl_target_name_override", AUTHORITY_HOST), ("grpc.max_send_message_length", -1)]
    credentials = grpc.ssl_channel_credentials(ca)
    with (
        grpc.secure_channel(server.address, credentials, options=options) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        channel.unary_unary(f"/housecall.Enrolment/{method}")(body, timeout=30)
    return caught.value.code()


def proof(holder: Identity, request: bytes, *, prefix: bytes = enrolment._PROOF, signed: bytes | None = None) -> bytes:
    signature = holder.sign(prefix + (request if signed is None else signed))
    return msgspec.msgpack.encode({"certificate": holder.certificate, "csr": request, "signature": signature})


def test_a_renewal_must_be_signed_with_the_old_key(
    authority: Authority, stranger: Authority, server: EnrolmentServer
) -> None:
    alice, eve = authority.identity("alice", "scientist"), authority.identity("eve", "scientist")
    request, before = csr(), len(authority.issued())
    fields = msgspec.msgpack.decode(proof(alice, request))
    for body in (
        proof(alice, request, signed=csr()),  # of another request
        proof(alice, request, prefix=b""),  # of another kind of text
        msgspec.msgpack.encode({**fields, "signature": eve.sign(enrolment._PROOF + request)}),  # another member's
        msgspec.msgpack.encode({**fields, "signature": b""}),
        msgspec.msgpack.encode({**fields, "certificate": authority.ca}),
        msgspec.msgpack.encode({**fields, "certificate": b"none"}),
        proof(stranger.identity("alice", "scientist"), request),  # certified by another authority
    ):
        assert sent(server, authority.ca, "Renew", body) is grpc.StatusCode.PERMISSION_DENIED
    assert len(authority.issued()) == before


def test_a_forged_certificate_with_a_members_serial_renews_nothing(
    authority: Authority, server: EnrolmentServer
) -> None:
    """Serial numbers are no secrets: whoever has seen a certificate can make another one that says the same."""
    alice, key = authority.identity("alice", "scientist"), new_key()
    forged = (
        x509.CertificateBuilder(alice.parsed.issuer, alice.parsed.subject, load_private_key(key).public_key())
        .serial_number(alice.serial)
        .not_valid_before(alice.not_before)
        .not_valid_after(alice.not_after)
        .sign(load_private_key(key), hashes.SHA256())
    )
    request, before = csr(), len(authority.issued())
    signature = load_private_key(key).sign(enrolment._PROOF + request, ec.ECDSA(hashes.SHA256()))
    body = {"certificate": forged.public_bytes(PEM), "csr": request, "signature": signature}
    assert sent(server, authority.ca, "Renew", msgspec.msgpack.encode(body)) is grpc.StatusCode.PERMISSION_DENIED
    assert len(authority.issued()) == before


@pytest.mark.parametrize(
    ("method", "body", "code"),
    [
        ("Enrol", b"", "INVALID_ARGUMENT"),
        ("Enrol", b"\xc1", "INVALID_ARGUMENT"),
        ("Enrol", b"\x91" * 60_000, "INVALID_ARGUMENT"),
        ("Enrol", b"\x82\xa6secret\xa2\xff\xfe\xa3csr\xc4\x00", "INVALID_ARGUMENT"),
        ("Enrol", msgspec.msgpack.encode({"secret": "x", "csr": b"", "more": 1}), "INVALID_ARGUMENT"),
        ("Enrol", msgspec.msgpack.encode({"secret": "x" * 129, "csr": b""}), "INVALID_ARGUMENT"),
        ("Enrol", msgspec.msgpack.encode({"secret": "x", "csr": b"x" * 16_385}), "INVALID_ARGUMENT"),
        ("Enrol", msgspec.msgpack.encode({"secret": "x", "csr": b""}), "PERMISSION_DENIED"),
        ("Enrol", b"x" * 70_000, "RESOURCE_EXHAUSTED"),
        ("Renew", msgspec.msgpack.encode({"secret": "x", "csr": b""}), "INVALID_ARGUMENT"),
        ("Renew", msgspec.msgpack.encode({"certificate": 1, "csr": b"", "signature": b""}), "INVALID_ARGUMENT"),
        ("Crl", b"\x81\xa1x\x01", "INVALID_ARGUMENT"),
        ("Revoke", b"\x80", "UNIMPLEMENTED"),
    ],
)
def test_what_no_honest_client_sends(
    authority: Authority, server: EnrolmentServer, method: str, body: bytes, code: str
) -> None:
    assert sent(server, authority.ca, method, body).name == code
    assert len(authority.issued()) == 1  # the server's own


def test_a_fault_of_the_authority_is_not_told(
    authority: Authority, server: EnrolmentServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> bytes:
        raise OSError("/secret/place is full")

    monkeypatch.setattr(authority, "crl", fail)
    with pytest.raises(IdentityError, match="the authority failed: its log says why") as caught:
        fetch_crl(server.address, authority.ca)
    assert "/secret/place" not in str(caught.value)
    assert "/secret/place" in caplog.text


def test_guessing_is_slowed(authority: Authority, server: EnrolmentServer, clock: Clock, tmp_path: Path) -> None:
    sound = authority.invite("alice", "scientist", url=server.address)
    guess = msgspec.structs.replace(sound, secret="guess")
    for _ in range(10):
        with pytest.raises(IdentityError, match="no invitation has this secret"):
            join(guess, tmp_path / "alice")
    with pytest.raises(IdentityError, match="too many refusals: wait a minute"):
        join(sound, tmp_path / "alice")
    clock.skip(seconds=61)
    assert join(sound, tmp_path / "alice").name == "alice"


def test_failures_are_counted_by_address_and_forgotten(clock: Clock) -> None:
    failures = Failures(2, 60, addresses=2, clock=clock.monotonic)
    for address in ("a", "a", "b"):
        assert not failures.too_many(address)
        failures.add(address)
    assert failures.too_many("a")
    assert not failures.too_many("b")
    failures.add("c")
    assert not failures.too_many("a")  # a third address: the oldest is forgotten
    failures.add("c")
    assert failures.too_many("c")
    clock.skip(seconds=60)
    assert not failures.too_many("c")


def test_the_list_is_fetched(authority: Authority, stranger: Authority, server: EnrolmentServer) -> None:
    alice = authority.identity("alice", "scientist")
    authority.revoke("alice")
    fetched = fetch_crl(server.address, authority.ca)
    assert read_crl(fetched, parsed(authority)).serials == {alice.serial}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(authority, "crl", stranger.crl)
        with pytest.raises(IdentityError, match="was not signed by the authority"):
            fetch_crl(server.address, authority.ca)
        patch.setattr(authority, "crl", lambda: bent(fetched))
        with pytest.raises(IdentityError, match="was not signed by the authority"):
            fetch_crl(server.address, authority.ca)


def test_the_servers_own_certificate_is_renewed(authority: Authority, clock: Clock) -> None:
    own = enrolment._Own(authority, clock)
    first = own.current()
    assert own.current() is first
    clock.skip(days=5)
    assert own.current().serial != first.serial


# -- the keeper ---------------------------------------------------------------------------------------------


class Kept:
    """A keeper on a clock, with an authority that can fail, and work beside that waits to be done."""

    def __init__(self, authority: Authority, folder: Path, clock: Clock) -> None:
        self.authority, self.folder = authority, folder
        self.first = authority.identity("clinic", "worker", HOSTS)
        self.first.save(folder)
        (folder / "authority.url").write_text("ca:1\n")
        self.renewals = self.fetches = 0
        self.failure: Exception | None = None
        self.work: list[Callable[[], None]] = []
        self.keeper = Keeper(folder, now=clock, ask_renew=self.renew, ask_crl=self.crl, beside=self.work.append)

    def renew(self, identity: Identity, url: str) -> Identity:
        assert url == "ca:1"
        self.renewals += 1
        if self.failure:
            raise self.failure
        key = new_key()
        return Identity(key, self.authority.renew(identity.serial, request_certificate(key, "x")), identity.ca)

    def crl(self, url: str, ca: bytes) -> bytes:
        self.fetches += 1
        if self.failure:
            raise self.failure
        return self.authority.crl()


@pytest.fixture
def kept(authority: Authority, tmp_path: Path, clock: Clock) -> Kept:
    return Kept(authority, tmp_path / "clinic", clock)


def test_an_identity_is_renewed_after_two_thirds_of_its_life(kept: Kept, clock: Clock) -> None:
    clock.skip(days=4.6)
    assert kept.keeper.current() == kept.first
    assert kept.work == []
    clock.skip(days=0.2)
    assert kept.keeper.current() == kept.first  # it does not wait
    (work,) = kept.work
    work()
    renewed = kept.keeper.current()
    assert renewed.serial != kept.first.serial
    assert Identity.load(kept.folder) == renewed
    assert mode(kept.folder / "identity.pem") == 0o600
    assert kept.renewals == len(kept.work) == 1


@pytest.mark.parametrize("failure", [IdentityError("no answer"), OSError("no disk"), ValueError("a bug")])
def test_when_it_cannot_be_renewed_the_old_one_is_used(
    kept: Kept, clock: Clock, caplog: pytest.LogCaptureFixture, failure: Exception
) -> None:
    clock.skip(days=5)
    kept.failure = failure
    kept.keeper.tend()
    assert kept.keeper.current() == kept.first
    assert f"could not renew the certificate{'' if isinstance(failure, ValueError) else f': {failure}'}" in caplog.text
    kept.keeper.tend()
    assert kept.renewals == 1  # not at every handshake
    assert kept.work == []
    clock.skip(minutes=6)
    kept.failure = None
    kept.keeper.tend()
    assert kept.keeper.current() != kept.first


def test_without_an_address_nothing_is_asked(kept: Kept, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    (kept.folder / "authority.url").unlink()
    keeper = Keeper(kept.folder, now=clock, ask_renew=kept.renew, ask_crl=kept.crl)
    clock.skip(days=5)
    keeper.tend()
    assert (kept.renewals, kept.fetches) == (0, 0)
    assert "does not say where the authority is" in caplog.text


def test_what_another_process_renewed_is_taken_up(kept: Kept, authority: Authority, clock: Clock) -> None:
    clock.skip(days=5)
    other = authority.identity("clinic", "worker", HOSTS)
    other.save(kept.folder)
    kept.keeper.tend()
    assert kept.keeper.current() == other
    assert kept.renewals == 0


def test_a_folder_that_only_others_renew_is_kept_in_peace(
    kept: Kept, authority: Authority, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    (kept.folder / "authority.url").unlink()
    keeper = Keeper(kept.folder, now=clock)
    clock.skip(days=5)
    authority.identity("clinic", "worker", HOSTS).save(kept.folder)
    keeper.tend()
    assert caplog.records == []


def test_what_is_due_begins_on_a_thread_of_its_own(kept: Kept, clock: Clock) -> None:
    done = threading.Event()
    threads = []

    def note(identity: Identity, url: str) -> Identity:
        threads.append(threading.current_thread())
        done.set()
        raise IdentityError("not today")

    keeper = Keeper(kept.folder, now=clock, ask_renew=note, ask_crl=kept.crl)
    clock.skip(days=5)
    keeper.current()
    assert done.wait(60)
    threads[0].join(60)
    assert threads[0].name == "housecall-keeper"
    assert kept.fetches == 1


def test_a_damaged_identity_is_not_taken_up(kept: Kept, caplog: pytest.LogCaptureFixture) -> None:
    (kept.folder / "identity.pem").write_bytes(b"")
    assert kept.keeper.current() == kept.first
    assert kept.keeper.current() == kept.first
    assert len(caplog.records) == 1
    assert "stays in use" in caplog.text


def test_the_keeper_fetches_the_list(kept: Kept, authority: Authority, clock: Clock) -> None:
    path = kept.folder / "crl.pem"
    kept.keeper.tend()
    assert path.read_bytes() == authority.crl()
    revocations = Revocations(path, authority.ca, now=clock)
    alice = authority.identity("alice", "scientist")
    old = authority.crl()
    authority.revoke("alice")
    kept.keeper.tend()
    assert kept.fetches == 1  # not so often
    clock.skip(minutes=1)
    kept.keeper.tend()
    revocations.look()
    assert revocations.revoked(alice.serial)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(authority, "crl", lambda: old)
        clock.skip(minutes=1)
        kept.keeper.tend()
    assert read_crl(path.read_bytes(), parsed(authority)).serials == {alice.serial}  # an older one is not taken
    path.write_bytes(b"damaged")
    clock.skip(minutes=1)
    kept.keeper.tend()
    assert read_crl(path.read_bytes(), parsed(authority)).serials == {alice.serial}


def test_the_keeper_runs_until_it_is_stopped(kept: Kept) -> None:
    stop = threading.Event()
    stop.set()
    kept.keeper.run(stop)
    assert kept.fetches == 1


def test_a_keeper_feeds_a_server(authority: Authority, server: EnrolmentServer, tmp_path: Path, clock: Clock) -> None:
    """All together: joined and served over TLS, renewed over TLS, shown without restart."""
    folder = tmp_path / "clinic"
    first = join(authority.invite("clinic", "worker", HOSTS, url=server.address), folder)
    alice = authority.identity("alice", "scientist")
    late = Clock()
    keeper = Keeper(folder, now=late)
    with served(keeper.current) as port:
        assert seen_by_client(port, alice, tmp_path) == first.serial
        late.skip(days=5)
        keeper.tend()
        assert keeper.current().serial != first.serial
        assert seen_by_client(port, alice, tmp_path) == keeper.current().serial
    assert read_crl((folder / "crl.pem").read_bytes(), parsed(authority)).number == 1


# -- the commands -------------------------------------------------------------------------------------------


def run(*words: str | Path) -> str:
    done = CliRunner().invoke(ca_app, [str(word) for word in words], env={"COLUMNS": "200"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "authority 'lakeside' is made" in run("init", "ca", "--name", "lakeside")
    authority = Authority.load("ca")
    with EnrolmentServer(authority, "127.0.0.1:0") as server:
        said = run("invite", "clinic", "--host", "localhost", "--host", "127.0.0.1", "--url", server.address)
        assert "clinic.invitation: hand it over like a password" in said
        assert "worker 'clinic' until" in run("join", "clinic.invitation")
        first = Identity.load("clinic")
        run("renew", "clinic")
        assert Identity.load("clinic").serial != first.serial
    text = run("invite", "alice", "--role", "scientist", "--out", "-", "--url", "ca:1")
    assert Invitation.parse(text).name == "alice"
    run("issue", "bob", "--days", "2")
    assert Identity.load("bob.pem").role == "scientist"
    assert run("revoke", "clinic").count("revoked: worker 'clinic'") == 2
    run("revoke", f"{Identity.load('bob.pem').serial:x}")
    table = run("list")
    assert re.search(r"clinic +│ worker +│ localhost +│ .* │ revoked ", table)
    assert re.search(r"alice +│ scientist .* │ invited", table)
    assert read_crl(Path("ca/crl.pem").read_bytes(), parsed(authority)).serials >= {first.serial}
    with pytest.raises(IdentityError, match="holds an authority already"):
        run("init", "ca")


def test_the_served_url_is_remembered(tmp_path: Path) -> None:
    run("init", tmp_path / "ca", "--url", "ca.example:7440")
    run("invite", "alice", "--role", "scientist", "--ca", tmp_path / "ca", "--out", tmp_path / "a")
    assert Invitation.load(tmp_path / "a").url == "ca.example:7440"
    assert json.loads((tmp_path / "ca" / "index.json").read_text())["url"] == "ca.example:7440"


def test_serving_ends_with_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("init", tmp_path / "ca")

    def interrupted(server: EnrolmentServer) -> None:
        assert fetch_crl(server.address, Authority.load(tmp_path / "ca").ca)
        raise KeyboardInterrupt

    monkeypatch.setattr(EnrolmentServer, "wait", interrupted)
    said = run("serve", tmp_path / "ca", "--listen", "127.0.0.1:0")
    assert re.search(r"authority 'housecall' listens on 127.0.0.1:\d+\nstopped", said)


def test_no_secret_is_logged(
    authority: Authority, server: EnrolmentServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    made = authority.invite("alice", "scientist", url=server.address)
    join(made, tmp_path / "alice")
    with pytest.raises(IdentityError):
        join(made, tmp_path / "again")
    assert "refused" in caplog.text
    assert made.secret not in caplog.text
    assert "PRIVATE" not in caplog.text
