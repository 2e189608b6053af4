"""The keeper of an identity's folder: renews it in time, fetches the revocation list, notices what others change.

NOTE [Who waits]
`current` is asked within TLS handshakes, so it never waits for a network: it answers with what is there, and has
`tend` run beside it if something is due. `tend` does the work and waits; `run` calls it until it is told to stop.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from ..errors import IdentityError
from .certificate import FILE, Identity, load_certificate, utc_now
from .enrolment import authority_url, fetch_crl, renew
from .files import locked, read, replace
from .names import target
from .revocation import read_crl

__all__ = ["CRL_FILE", "Keeper"]

CRL_FILE = "crl.pem"
RETRY = timedelta(minutes=5)
CRL_EVERY = timedelta(minutes=1)
MAX_CRL_BYTES = 64 << 20

_log = logging.getLogger(__name__)


def _beside(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="housecall-keeper", daemon=True).start()


class Keeper:
    """Keeps the identity in a folder alive. Raises `IdentityError` if there is none.

    A failure to renew is logged, tried again after five minutes, and the old certificate is used until it ends.
    `url` is where the authority is, if the folder does not say. `lists`: whether revocation lists are fetched
    too, which whoever only connects does not need. `ask_renew` and `ask_crl` speak with the authority;
    `beside` runs a function without waiting for it."""

    def __init__(
        self,
        folder: str | Path,
        *,
        url: str = "",
        lists: bool = True,
        now: Callable[[], datetime] = utc_now,
        ask_renew: Callable[[Identity, str], Identity] = renew,
        ask_crl: Callable[[str, bytes], bytes] = fetch_crl,
        beside: Callable[[Callable[[], None]], None] = _beside,
    ) -> None:
        self._folder = Path(folder)
        self._now, self._ask_renew, self._ask_crl, self._beside = now, ask_renew, ask_crl, beside
        self._lists = lists
        self._stamp = self._stat()
        self._identity = Identity.load(self._folder)
        self._url = target(url) if url else authority_url(self._folder)
        self._renew_after = self._crl_after = datetime.min.replace(tzinfo=self._identity.not_after.tzinfo)
        self._tending = threading.Lock()
        self._troubles: dict[str, str] = {}  # what does not succeed -> why, and since when

    @property
    def authority(self) -> str:
        """Where the authority is, HOST:PORT; "" if nobody says, and then nothing is renewed."""
        return self._url

    @property
    def trouble(self) -> str:
        """What it has tried and could not, since it last could; "" if all is well. It keeps trying."""
        return "; ".join(self._troubles.values())

    def current(self) -> Identity:
        """The identity to use now, at once; what is due is begun beside."""
        self._notice()
        if self._renewal_due() and not self._tending.locked():
            self._beside(self.tend)
        return self._identity

    def tend(self) -> None:
        """Do what is due: renew, fetch the list. Waits for the authority; raises nothing."""
        if not self._tending.acquire(blocking=False):
            return  # somebody is at it
        try:
            self._notice()
            if self._renewal_due():
                self._renew_after = self._now() + RETRY
                self._attempt(self._renew, "renew the certificate")
            if self._lists and self._url and self._now() >= self._crl_after:
                self._crl_after = self._now() + CRL_EVERY
                self._attempt(self._fetch, "fetch the revocation list")
        finally:
            self._tending.release()

    def run(self, stop: threading.Event, every: float = 60.0) -> None:
        """Tend every so many seconds until `stop` is set: what a worker's thread does."""
        self.tend()
        while not stop.wait(every):
            self.tend()

    def _renewal_due(self) -> bool:
        return self._now() >= max(self._identity.renews_at, self._renew_after)

    def _attempt(self, work: Callable[[], None], what: str) -> None:
        try:
            work()
            self._troubles.pop(what, None)
        except (IdentityError, OSError) as error:
            _log.warning("%r could not %s: %s", self._identity, what, error)
            self._note(what, str(error))
        except Exception as error:  # a worker must not lose its keeper to one bad answer
            _log.exception("%r could not %s", self._identity, what)
            self._note(what, f"{type(error).__name__}: {error}")

    def _note(self, what: str, why: str) -> None:
        since = self._troubles.get(what, f"since {self._now():%Y-%m-%d %H:%M} UTC").split(" UTC")[0]
        self._troubles[what] = f"{since} UTC it could not {what}: {why}"

    def _renew(self) -> None:
        if not self._url:
            raise IdentityError(f"{self._folder} does not say where the authority is: have a new identity made")
        with locked(self._folder / ".lock"):
            self._notice()  # another process may have renewed it meanwhile
            if self._now() < self._identity.renews_at:
                return
            new = self._ask_renew(self._identity, self._url)
            new.save(self._folder)
        self._notice()
        _log.info("renewed: %r", self._identity)

    def _fetch(self) -> None:
        ca, path = load_certificate(self._identity.ca), self._folder / CRL_FILE
        pem = self._ask_crl(self._url, self._identity.ca)
        try:
            last = read_crl(read(path, MAX_CRL_BYTES), ca).number
        except IdentityError:
            last = 0  # missing or damaged: any sound one is better
        if read_crl(pem, ca).number > last:
            replace(path, pem)

    def _notice(self) -> None:
        """Take up what another process has put into the folder."""
        stamp = self._stat()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._identity = Identity.load(self._folder)
        except IdentityError as error:
            _log.warning("%s; %r stays in use", error, self._identity)

    def _stat(self) -> tuple[int, int, int]:
        try:
            found = (self._folder / FILE).stat()
        except OSError:
            return 0, 0, 0
        return found.st_mtime_ns, found.st_size, found.st_ino
