"""Enrolment over the network, both halves: the authority's server, and what newcomers and members ask of it.

NOTE [One port, without client certificates]
gRPC's servers ask every client for a certificate or none. A newcomer has none, so this server asks none, and a member
who renews proves who she is in the message instead: it carries her certificate, and her new signing request signed
with the key of that certificate. The server checks the signature, that the authority issued the certificate, and
that it is neither over nor revoked. One port, one way in, and nothing rests on how a proxy forwards certificates.
The signed text holds no time and no nonce: whoever could say it again would be given a certificate for a key that is
not theirs, which is of no use, and only until the old certificate ends.

NOTE [Whom a newcomer trusts]
Nobody but the certificate in the invitation: the server must show one that this authority signed for `AUTHORITY_HOST`,
a name that no member can get. So a member cannot pose as the authority and collect invitations, and the authority may
be reached by any host name or address.

On the wire: unary gRPC, bodies in MessagePack, 64 KiB at most but for the revocation list; unknown fields are refused.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, NoReturn, Self, TypeVar

import grpc
import msgspec
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from ..errors import IdentityError
from .authority import MAX_CSR_BYTES, Authority
from .certificate import (
    FILE,
    MALFORMED,
    Identity,
    load_certificate,
    new_key,
    request_certificate,
    server_credentials,
    utc_now,
)
from .files import make_folder, read, replace
from .invitation import Invitation
from .names import AUTHORITY_HOST, target
from .revocation import read_crl

__all__ = ["EnrolmentServer", "Failures", "authority_url", "fetch_crl", "join", "renew"]

SERVICE = "housecall.Enrolment"
MAX_MESSAGE_BYTES = 64 << 10
MAX_CRL_BYTES = 64 << 20
MAX_CALLS = 32  # at once; more are refused
THREADS = 4
URL_FILE = "authority.url"
TIMEOUT = 10.0  # seconds that a client waits for the authority

_IMPOSTOR = ("CERTIFICATE_VERIFY_FAILED", "Hostname Verification Check failed")  # in gRPC's words
_PROOF = b"housecall: renew my certificate, version 1\n"  # a key signs nothing else that begins so

_log = logging.getLogger(__name__)

Pem = Annotated[bytes, msgspec.Meta(max_length=MAX_CSR_BYTES)]


class Enrol(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A newcomer's: the secret of an invitation, and a signing request."""

    secret: Annotated[str, msgspec.Meta(max_length=128)]
    csr: Pem


class Renew(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A member's: her certificate, a signing request for a new key, and the old key's signature of that."""

    certificate: Pem
    csr: Pem
    signature: Annotated[bytes, msgspec.Meta(max_length=256)]


class FetchCrl(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Anyone's: the revocation list is no secret."""


class Granted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The answer to all three: a certificate, or the list."""

    pem: bytes


Request = TypeVar("Request", Enrol, Renew, FetchCrl)


class Failures:
    """How often each address has failed lately. Bounded in memory: of too many addresses the oldest is forgotten.

    It spares the machine, no more: a secret of 256 random bits is not guessed."""

    def __init__(
        self,
        limit: int = 10,
        per: float = 60.0,
        *,
        addresses: int = 4096,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit, self._per, self._addresses, self._clock = limit, per, addresses, clock
        self._times: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def too_many(self, address: str) -> bool:
        """Whether `limit` failures lie within the last `per` seconds."""
        with self._lock:
            times = self._times.get(address, deque())
            while times and self._clock() - times[0] >= self._per:
                times.popleft()
            return len(times) >= self._limit

    def add(self, address: str) -> None:
        """Note one more."""
        with self._lock:
            times = self._times.setdefault(address, deque(maxlen=self._limit))
            times.append(self._clock())
            self._times.move_to_end(address)
            while len(self._times) > self._addresses:
                self._times.popitem(last=False)


class EnrolmentServer:
    """The authority's server, from when it is made until `stop`; also a context manager.

    `listen` is HOST:PORT; with port 0 the system chooses one, and `address` says which."""

    def __init__(
        self,
        authority: Authority,
        listen: str,
        *,
        failures: Failures | None = None,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._authority = authority
        self._failures = failures or Failures()
        self._own = _Own(authority, now)
        self._server = grpc.server(
            ThreadPoolExecutor(THREADS, thread_name_prefix="housecall-ca"),
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_CRL_BYTES),
                ("grpc.max_metadata_size", 8 << 10),
                ("grpc.server_handshake_timeout_ms", 10_000),  # who says nothing does not stay
                ("grpc.so_reuseport", 0),  # two servers on one port would share its callers without a word
            ],
            maximum_concurrent_rpcs=MAX_CALLS,
        )
        self._server.add_generic_rpc_handlers((self._handlers(),))
        host = target(listen).rpartition(":")[0]
        try:
            port = self._server.add_secure_port(
                target(listen), server_credentials(self._own.current, ask_clients=False)
            )
        except RuntimeError:
            raise IdentityError(f"the authority cannot listen on {listen}: is the port in use?") from None
        self.address = f"{host}:{port}"
        self._server.start()

    def stop(self, grace: float = 1.0) -> None:
        """End: answers under way have `grace` seconds."""
        self._server.stop(grace).wait()

    def wait(self) -> None:
        """Until the server is stopped."""
        self._server.wait_for_termination()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _handlers(self) -> grpc.GenericRpcHandler:
        methods = {
            "Enrol": self._method(Enrol, self._enrol),
            "Renew": self._method(Renew, self._renew),
            "Crl": self._method(FetchCrl, self._crl),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def _method(self, kind: type[Request], do: Callable[[Request], bytes]) -> grpc.RpcMethodHandler[Any, Any]:
        decoder = msgspec.msgpack.Decoder(kind)

        def handle(body: bytes, context: grpc.ServicerContext) -> bytes:
            address = context.peer().rpartition(":")[0]
            if self._failures.too_many(address):
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many refusals: wait a minute")
            try:
                return msgspec.msgpack.encode(Granted(do(decoder.decode(body))))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                why = f"no {kind.__name__} message: {str(error)[:200]!a}"  # it may quote what came
                self._refuse(context, address, grpc.StatusCode.INVALID_ARGUMENT, why)
            except IdentityError as error:
                self._refuse(context, address, grpc.StatusCode.PERMISSION_DENIED, str(error))
            except Exception:
                _log.exception("the authority failed to answer %s", kind.__name__)
                context.abort(grpc.StatusCode.INTERNAL, "the authority failed: its log says why")

        return grpc.unary_unary_rpc_method_handler(handle)  # bytes in, bytes out

    def _refuse(self, context: grpc.ServicerContext, address: str, code: grpc.StatusCode, why: str) -> NoReturn:
        self._failures.add(address)
        _log.warning("refused %s: %s", address, why)
        context.abort(code, why)

    def _enrol(self, request: Enrol) -> bytes:
        return self._authority.redeem(request.secret, request.csr)

    def _renew(self, request: Renew) -> bytes:
        certificate = load_certificate(request.certificate)
        try:
            certificate.verify_directly_issued_by(load_certificate(self._authority.ca))
            key = certificate.public_key()
            if not isinstance(key, ec.EllipticCurvePublicKey):
                raise IdentityError("the certificate is not this authority's")
            key.verify(request.signature, _PROOF + request.csr, ec.ECDSA(hashes.SHA256()))
        except MALFORMED:
            raise IdentityError("who asks to renew a certificate did not show that its key is theirs") from None
        return self._authority.renew(certificate.serial_number, request.csr)

    def _crl(self, request: FetchCrl) -> bytes:
        return self._authority.crl()


class _Own:
    """The server's own identity: its key is in memory only, and it is made anew when two thirds of its life are
    over."""

    def __init__(self, authority: Authority, now: Callable[[], datetime]) -> None:
        self._authority, self._now = authority, now
        self._lock = threading.Lock()
        self._identity = authority.server_identity()

    def current(self) -> Identity:
        with self._lock:
            if self._now() >= self._identity.renews_at:
                self._identity = self._authority.server_identity()
            return self._identity


# -- the other half -----------------------------------------------------------------------------------------


def join(invitation: Invitation, folder: str | Path, *, timeout: float = TIMEOUT) -> Identity:
    """Become whom the invitation names: make a key, have it certified, and save both in `folder`.

    The key never leaves this machine. Raises `IdentityError` if the authority refuses or does not answer, if
    what answers is not the authority of the invitation, or if the folder holds an identity already."""
    folder = Path(folder)
    if not invitation.url:
        raise IdentityError("the invitation does not say where the authority is: ask for one made with --url")
    if (folder / FILE).exists():
        raise IdentityError(f"{folder} holds an identity already: renew that, or name another folder")
    make_folder(folder)
    replace(folder / URL_FILE, f"{invitation.url}\n".encode())  # before the secret is spent: can we write here?
    key, ca = new_key(), invitation.ca.encode()
    request = Enrol(invitation.secret, request_certificate(key, invitation.name))
    made = Identity(key, _ask(invitation.url, ca, "Enrol", request, timeout), ca)
    if (made.name, made.role) != (invitation.name, invitation.role):
        raise IdentityError(f"the authority made {made!r}; the invitation was for {invitation!r}")
    made.save(folder)
    return made


def renew(identity: Identity, url: str, *, timeout: float = TIMEOUT) -> Identity:
    """The same identity with a new key and a new certificate; nothing is saved. Raises `IdentityError`."""
    if not url:
        raise IdentityError(f"nobody said where the authority of {identity!r} is: ask its owner for an invitation")
    key = new_key()
    csr = request_certificate(key, identity.name)
    request = Renew(identity.certificate, csr, identity.sign(_PROOF + csr))
    made = Identity(key, _ask(url, identity.ca, "Renew", request, timeout), identity.ca)
    if (made.name, made.role) != (identity.name, identity.role):
        raise IdentityError(f"the authority made {made!r} of {identity!r}")
    return made


def fetch_crl(url: str, ca: bytes, *, timeout: float = TIMEOUT) -> bytes:
    """The authority's revocation list (PEM), its signature checked. Raises `IdentityError`."""
    pem = _ask(url, ca, "Crl", FetchCrl(), timeout)
    read_crl(pem, load_certificate(ca))
    return pem


def authority_url(folder: str | Path) -> str:
    """Where the authority of an identity's folder is (HOST:PORT), or "" if nobody said."""
    path = Path(folder) / URL_FILE
    return target(read(path, 1024).decode(errors="replace").strip()) if path.exists() else ""


def _ask(url: str, ca: bytes, method: str, request: Enrol | Renew | FetchCrl, timeout: float) -> bytes:
    options = [
        ("grpc.ssl_target_name_override", AUTHORITY_HOST),
        ("grpc.max_receive_message_length", MAX_CRL_BYTES if method == "Crl" else MAX_MESSAGE_BYTES),
    ]
    with grpc.secure_channel(target(url), grpc.ssl_channel_credentials(ca), options=options) as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{SERVICE}/{method}")
        try:
            body = call(msgspec.msgpack.encode(request), timeout=timeout)
            return msgspec.msgpack.decode(body, type=Granted).pem
        except grpc.RpcError as error:
            raise IdentityError(_explained(error, url)) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise IdentityError(f"the authority at {url} answered with no certificate: {error}") from None


def _explained(error: grpc.RpcError, url: str) -> str:
    code, details = error.code(), error.details()
    if code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT):
        return f"the authority at {url} refused: {details}"
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return f"the authority at {url} is busy: {details}"
    if code is grpc.StatusCode.UNAVAILABLE and any(sign in (details or "") for sign in _IMPOSTOR):
        return f"what answers at {url} is not the authority that was expected there: nothing was sent"
    return f"no answer from the authority at {url} ({code.name}): {details}"
