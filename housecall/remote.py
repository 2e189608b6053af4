"""A worker in another process or on another machine, as its caller holds it: `connect` gives one."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import grpc
import torch

from . import __version__
from .errors import IdentityError, UsageError
from .identity.certificate import Identity, client_credentials, utc_now
from .identity.keeper import Keeper
from .pointers.location import Location
from .pointers.session import Session
from .transport.grpc import address, dial, is_loopback
from .transport.stream import Dial, StreamTransport

__all__ = ["RemoteWorker", "connect", "reach"]

RENEW_EVERY_S = 60.0  # how often a session that sends looks whether its certificate is to be renewed

log = logging.getLogger(__name__)


class RemoteWorker(Location):
    """A session at a worker that is reached over a network. `with` closes it, and the worker frees its values.

    `id` is the name that the worker gives itself, `address` where it was reached."""

    def __init__(self, dial: Dial, address: str, *, synchronous: bool = False, patience: float = 10.0) -> None:
        self.address = address
        client = f"housecall {__version__}, torch {torch.__version__}"
        transport = StreamTransport(dial, name=address, client=client, patience=patience)
        transport.name = transport.worker
        super().__init__(transport.worker, Session(transport, self, synchronous=synchronous))

    def close(self) -> None:
        """End the session; pointers that are left point at nothing, and say so."""
        self.session.close()

    def __enter__(self) -> RemoteWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<RemoteWorker id:{self.id} at {self.address}>"


def connect(
    url: str,
    identity: Identity | str | os.PathLike[str] | None = None,
    *,
    plaintext: bool = False,
    synchronous: bool = False,
    patience: float = 10.0,
) -> RemoteWorker:
    """Open a session at the worker at `url`: `grpcs://host:port`, over mutual TLS with `identity`.

    `identity` is a folder or PEM file as `housecall ca join` makes it. The certificate in a folder is renewed when two
    thirds of its life are over, as long as somebody works with it; one in a file, or one that has ended, is not.
    `grpc://host:port` is plain text: on this machine the scheme alone asks for it, elsewhere `plaintext=True` is needed
    as well. A lost connection is tried again for `patience` seconds. Raises `UsageError` for an address or identity
    that cannot be meant, `IdentityError` for one that is damaged or has ended, `WorkerGone` if no worker answers or it
    refuses."""
    return RemoteWorker(reach(url, identity, plaintext=plaintext), url, synchronous=synchronous, patience=patience)


def reach(url: str, identity: Identity | str | os.PathLike[str] | None, *, plaintext: bool = False) -> Dial:
    """How to open streams to the worker at `url`, as `connect` does."""
    where = address(url)
    if where.secure:
        if identity is None:
            raise UsageError(f"{url} needs an identity: a folder or PEM file, made with `housecall ca join INVITATION`")
        shown = _shown(identity)
        shown()  # what is wrong with it is said now
        secure = dial(where, lambda: _credentials(shown()))
        return lambda outgoing: secure(_keeping(outgoing, shown))
    if identity is not None:
        raise UsageError(f"{url} is plain text and shows no identity: write grpcs://{where}")
    if not plaintext and not is_loopback(where.host):
        raise UsageError(
            f"{url} would send everything in plain text: write grpcs://{where} and give an identity, "
            "or pass plaintext=True if you mean it"
        )
    return dial(where, None)


def _shown(identity: Identity | str | os.PathLike[str]) -> Callable[[], Identity]:
    """What gives the identity to show: of a folder, the one that is there, renewed beside when it is due."""
    if not isinstance(identity, Identity):
        path = Path(identity)
        if path.is_dir():
            return Keeper(path, lists=False).current
        identity = Identity.load(path)
    if utc_now() >= identity.renews_at:
        log.warning("%r is not renewed by itself: keep it in a folder, as `housecall ca join` makes it", identity)
    return lambda: identity


def _credentials(identity: Identity) -> grpc.ChannelCredentials:
    if utc_now() >= identity.not_after:
        raise IdentityError(
            f"the certificate of {identity.principal} ended {identity.not_after:%Y-%m-%d %H:%M} UTC, and only one that "
            "has not can be renewed: ask the authority's owner for a new invitation (`housecall ca invite "
            f"{identity.name} --role {identity.role}`), then `housecall ca join` it"
        )
    return client_credentials(identity)


def _keeping(outgoing: Iterator[bytes], shown: Callable[[], Identity]) -> Iterator[bytes]:
    """What is sent, and now and then a look whether the certificate is to be renewed: a session can outlive it."""
    looked = time.monotonic()
    for packet in outgoing:
        if time.monotonic() - looked >= RENEW_EVERY_S:
            looked = time.monotonic()
            shown()
        yield packet
