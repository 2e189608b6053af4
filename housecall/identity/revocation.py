"""The revocation list, as a worker asks it: at every step, without a restart, and never fooled into forgetting.

NOTE [Who reads]
Whoever asks gets an answer from memory. The file is looked at by a thread of its own (`watch`), and read there when it
has changed: a list of a hundred thousand takes a fifth of a second, and nobody's turn waits for it.

NOTE [A list that cannot be read]
At the start there must be a sound list, or none at all (nothing is revoked yet). Later a list that is missing,
damaged, signed by another, or older than the one in use is not believed: the last good one stays, and the log
says so. The order is the list's own number, which is signed; a file's date is not.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from ..errors import IdentityError
from .certificate import MALFORMED, load_certificate, utc_now
from .files import read

__all__ = ["Crl", "Revocations", "read_crl", "watch"]

MAX_BYTES = 64 << 20
EVERY = 0.5  # seconds between two looks at the file

_log = logging.getLogger(__name__)

Stamp = tuple[int, int, int] | None  # what changes when a file does; None for no file


@dataclass(frozen=True)
class Crl:
    """A revocation list whose signature was checked: its place in the order, its dates, and the serial numbers."""

    number: int
    last_update: datetime
    next_update: datetime
    serials: frozenset[int]


def read_crl(pem: bytes, ca: x509.Certificate) -> Crl:
    """The list in a PEM text, if the authority signed it. Raises `IdentityError`."""
    try:
        found = x509.load_pem_x509_crl(pem)
        key = ca.public_key()
        ours = isinstance(key, ec.EllipticCurvePublicKey) and found.issuer == ca.subject
        sound = ours and found.is_signature_valid(key)  # type: ignore[arg-type]  # it is a key of that kind by now
        number = found.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        serials = frozenset(entry.serial_number for entry in found)
        since, until = found.last_update_utc, found.next_update_utc
    except MALFORMED:
        raise IdentityError("the revocation list is damaged") from None
    if not sound:
        raise IdentityError("the revocation list was not signed by the authority")
    if until is None:
        raise IdentityError("the revocation list does not say how long it is good for")
    return Crl(number, since, until, serials)


class Revocations:
    """What is revoked, by the list in a file as it was at the last `look`.

    Raises `IdentityError` at the start if there is a list that cannot be believed."""

    def __init__(self, path: str | Path, ca: bytes, *, now: Callable[[], datetime] = utc_now) -> None:
        self._path = Path(path)
        self._ca = load_certificate(ca)
        self._now = now
        self._crl: Crl | None = None
        self._stamp: Stamp = None
        self._warned: Crl | None = None
        if (stamp := self._stat()) is not None:
            self._stamp, self._crl = stamp, self._read()

    def revoked(self, serial: int) -> bool:
        """Whether the certificate with this number is revoked. Touches no file."""
        return self._crl is not None and serial in self._crl.serials

    def look(self) -> None:
        """Look at the file, and read it if it has changed. For one thread; see NOTE [Who reads]."""
        stamp = self._stat()
        if stamp != self._stamp:
            self._reload(stamp)
            self._stamp = stamp
        self._warn_if_old()

    def __repr__(self) -> str:
        return f"the revocation list {self._path}"

    def _reload(self, stamp: Stamp) -> None:
        if stamp is None:
            _log.warning("the revocation list %s is gone; the last one stays in force", self._path)
            return
        try:
            new = self._read()
        except IdentityError as error:
            _log.warning("%s; the last list stays in force, from %s", error, self._path)
            return
        if self._crl is not None and new.number < self._crl.number:
            _log.warning(
                "%s has list number %d, older than number %d, which stays in force",
                self._path, new.number, self._crl.number,
            )  # fmt: skip
            return
        self._crl = new

    def _warn_if_old(self) -> None:
        crl = self._crl
        if crl is not None and crl is not self._warned and self._now() > crl.next_update:
            self._warned = crl
            _log.warning("the revocation list %s was good until %s: fetch a newer one", self._path, crl.next_update)

    def _read(self) -> Crl:
        try:
            return read_crl(read(self._path, MAX_BYTES), self._ca)
        except IdentityError as error:
            raise IdentityError(f"{self._path}: {error}") from None

    def _stat(self) -> Stamp:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


def watch(lists: Iterable[Revocations], stop: threading.Event, every: float = EVERY) -> None:
    """Look at these lists every so many seconds until `stop` is set: what a worker's thread does."""
    while not stop.wait(every):
        for one in lists:
            try:
                one.look()
            except Exception:  # a worker must not lose its watch to one bad file
                _log.exception("%s could not be looked at; it is tried again", one)
