"""An invitation: the small file by which a newcomer finds the authority, knows it, and is known to it. Once."""

from __future__ import annotations

import tomllib
from datetime import datetime
from pathlib import Path
from typing import Annotated

import msgspec
import tomli_w

from ..errors import IdentityError
from .certificate import load_certificate
from .files import read, replace
from .names import check_hosts, check_name, check_role, target

__all__ = ["Invitation"]

MAX_BYTES = 64 << 10

_HEAD = """\
# An invitation to a Housecall federation. Whoever holds this file can become {role} '{name}', once, until
# {expires:%Y-%m-%d %H:%M} UTC: hand it over like a password. Then:  housecall ca join FILE

"""


class Invitation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an authority hands to a newcomer. `secret` is known to nobody else: the authority keeps only its hash.

    `ca` is the authority's certificate (PEM), which the newcomer pins; `url` may be empty if nobody serves."""

    name: str
    role: str
    hosts: tuple[str, ...] = ()
    url: str
    expires: datetime
    secret: Annotated[str, msgspec.Meta(max_length=128)]
    ca: str

    def __repr__(self) -> str:
        """Whom it invites; never the secret."""
        return f"<Invitation of {self.role} '{self.name}' until {self.expires:%Y-%m-%d %H:%M} UTC>"

    __str__ = __repr__

    def text(self) -> str:
        """The file, as it is handed over (TOML)."""
        body = {**msgspec.structs.asdict(self), "hosts": list(self.hosts)}
        head = _HEAD.format(role=self.role, name=self.name, expires=self.expires)
        return head + tomli_w.dumps(body, multiline_strings=True)

    def save(self, path: str | Path) -> None:
        """Write the file, readable by its owner alone."""
        replace(Path(path), self.text().encode(), private=True)

    @classmethod
    def parse(cls, text: str) -> Invitation:
        """The invitation in a text. Raises `IdentityError`."""
        if len(text) > MAX_BYTES:
            raise IdentityError(f"an invitation has at most {MAX_BYTES} characters, found {len(text)}")
        try:
            found = msgspec.convert(tomllib.loads(text), cls)
        except (tomllib.TOMLDecodeError, msgspec.ValidationError, RecursionError) as error:
            raise IdentityError(f"this is no invitation: {error}") from None
        check_name(found.name)
        check_role(found.role)
        check_hosts(found.hosts, found.role)
        load_certificate(found.ca.encode())
        if found.url:
            target(found.url)
        if found.expires.tzinfo is None:
            raise IdentityError("this is no invitation: its end has no time zone")
        return found

    @classmethod
    def load(cls, path: str | Path) -> Invitation:
        """The invitation in a file. Raises `IdentityError`."""
        try:
            return cls.parse(read(Path(path), MAX_BYTES).decode())
        except UnicodeDecodeError:
            raise IdentityError(f"{path} is no invitation: it is not a text") from None
