"""`Config`: what an owner says about a worker before it runs, read from `worker.toml` in the worker's folder.

What must live here: every key, its default, its bounds and the sentence that explains it, each stated once: the
file that `create` writes takes its comments from the types below. What must not: torch, sockets, keys.
The reading is strict: an unknown key or a wrong type is refused by name. Nothing is read at import.
"""

from __future__ import annotations

import os
import re
import textwrap
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import tomli_w
from msgspec import Meta

from ..errors import UsageError

__all__ = ["CONFIG_FILE", "DATA_FOLDER", "Config", "Identity", "Limits", "Sandbox", "host_and_port"]

CONFIG_FILE = "worker.toml"
DATA_FOLDER = "data"

_NAME = re.compile(r"[A-Za-z0-9._-]{1,63}", re.ASCII)
_LISTEN = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})", re.ASCII)
_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,3})?", re.ASCII)


def host_and_port(text: str, name: str) -> tuple[str, int]:
    """The two of HOST:PORT, an IPv6 address without its brackets. Raises `UsageError`; `name` is what the text is
    called there."""
    found = _LISTEN.fullmatch(text)
    if not found or int(found[2]) > 65535:
        raise UsageError(
            f"{name} {text[:80]!r} must be HOST:PORT, as in '127.0.0.1:7443' or '[::1]:7443', the port from 0 to 65535"
        )
    return found[1].strip("[]"), int(found[2])


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one session may use of the machine, and one principal. More is refused, call by call; nothing dies of it.
    MB are 10^6 bytes."""

    session_mb: Annotated[
        int, Meta(ge=1, le=10**9, description="Memory that one session's tensors may hold together, in MB.")
    ] = 4_000
    slots: Annotated[int, Meta(ge=1, le=10**9, description="Tensors that one session may hold at a time.")] = 100_000
    call_mb: Annotated[int, Meta(ge=1, le=10**9, description="Memory that one call's outputs may take, in MB.")] = 2_000
    call_gflop: Annotated[
        int,
        Meta(
            ge=1,
            le=10**9,
            description="Operations that one call may take, in 10^9: one that runs cannot be stopped, and others wait.",
        ),
    ] = 2_000
    compute_s: Annotated[
        float, Meta(gt=0, le=10**9, description="Computing time that one session may use, in seconds.")
    ] = 86_400.0
    frame_mb: Annotated[
        int, Meta(ge=1, le=10**6, description="Largest frame that is taken from the wire, its tensors included, in MB.")
    ] = 4_000
    inbox_mb: Annotated[
        int,
        Meta(
            ge=1,
            le=10**6,
            description="Tensors of all frames that come or wait, in MB: one principal has half; best twice frame_mb.",
        ),
    ] = 8_000
    sessions: Annotated[int, Meta(ge=1, le=4096, description="Sessions that one principal may have at a time.")] = 64


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the worker's key and certificates lie; paths are relative to the worker's folder."""

    folder: Annotated[
        str, Meta(min_length=1, description="Folder of the private key and the certificates: for this user only.")
    ] = "identity"
    ca_url: Annotated[
        str,
        Meta(description="HOST:PORT of the authority that renews the certificate; empty: as authority.url says."),
    ] = ""
    crl: Annotated[
        str,
        Meta(description="File of revoked certificates, read again whenever it changes; empty: crl.pem in the folder."),
    ] = ""


class Sandbox(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the process gives up before it reads any data. `worker status` says which protections are in force."""

    strict: Annotated[
        bool, Meta(description="Whether the worker refuses to start when a protection is not to be had here.")
    ] = False
    memory_mb: Annotated[
        Annotated[int, Meta(ge=0, le=10**9)] | Literal["most"],
        Meta(
            description="Memory in MB that the process may allocate, 8 a thread included; 0: no bound. "
            '"most": 9/10 of all, without a GPU.',
        ),
    ] = "most"
    network: Annotated[
        Literal["listen", "open"],
        Meta(description="listen: it connects to nobody but its authority. open: the network is not restricted."),
    ] = "listen"


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One worker's settings."""

    name: Annotated[str, Meta(description="What this worker is called: letters, digits, '-', '.', '_'; 1 to 63.")]
    listen: Annotated[
        str, Meta(description="HOST:PORT to listen at. 127.0.0.1 is this machine only, 0.0.0.0 every network it is on.")
    ] = "127.0.0.1:7443"
    threads: Annotated[
        int, Meta(ge=0, le=4096, description="Threads within one operation; 0: chosen at start from the free cores.")
    ] = 0
    device: Annotated[str, Meta(description="Where values live and operations run: cpu, cuda or cuda:N.")] = "cpu"
    lease_s: Annotated[
        float, Meta(gt=0, le=10**7, description="Seconds for which the session of a client that is gone is kept.")
    ] = 300.0
    drain_s: Annotated[
        float, Meta(ge=0, le=10**5, description="Seconds that what has come may take to be done when the worker ends.")
    ] = 30.0
    limits: Limits = Limits()
    identity: Identity = Identity()
    sandbox: Sandbox = Sandbox()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or set(self.name) == {"."}:
            raise ValueError(f"name {self.name!r} must be 1 to 63 letters, digits, '-', '.' or '_'")
        host_and_port(self.listen, "listen")
        if not _DEVICE.fullmatch(self.device):
            raise ValueError(f"device {self.device!r} must be 'cpu', 'cuda' or 'cuda:N'")

    def keys(self, folder: Path) -> Path:
        """Where the key and the certificates of the worker in `folder` lie."""
        return folder / self.identity.folder

    def revocation_lists(self, folder: Path) -> tuple[Path, ...]:
        """The files of revoked certificates: what is in any of them counts. The first is what the authority's is
        fetched to."""
        own = self.keys(folder) / "crl.pem"
        named = folder / self.identity.crl if self.identity.crl else own
        return tuple(dict.fromkeys((own, named)))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Config:
        """The settings in `folder`. Raises `UsageError` that names the key that is unknown, wrong or missing."""
        path = Path(folder) / CONFIG_FILE
        try:
            return cls.parse(path.read_text(encoding="utf-8"), str(path))
        except FileNotFoundError:
            raise UsageError(f"no {CONFIG_FILE} in {folder}: make a worker with `housecall worker init NAME`") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} cannot be read: {error}") from None

    @classmethod
    def parse(cls, text: str, source: str = CONFIG_FILE) -> Config:
        """The settings that a TOML text states; `source` names it in errors. Raises `UsageError`."""
        try:
            return msgspec.toml.decode(text, type=cls)
        except (msgspec.DecodeError, RecursionError) as error:
            raise UsageError(f"{source}: {error}".replace("`$.", "`")) from None

    @classmethod
    def create(cls, folder: str | os.PathLike[str], name: str, listen: str | None = None) -> Config:
        """Make a worker's folder: `worker.toml`, and empty `identity/` and `data/` that only this user may read.

        Raises `UsageError` if a setting is wrong, before anything is made, or if a worker lives there already."""
        folder = Path(folder)
        settings = {"name": name} if listen is None else {"name": name, "listen": listen}
        config = cls.parse(tomli_w.dumps(settings), "worker init")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for inner in (config.identity.folder, DATA_FOLDER):
                (folder / inner).mkdir(mode=0o700, exist_ok=True)
                (folder / inner).chmod(0o700)
            with (folder / CONFIG_FILE).open("x", encoding="utf-8") as file:  # "x": never over another worker's
                file.write(config.text())
        except FileExistsError as error:
            raise UsageError(f"{error.filename} is there already: choose another name or --folder") from None
        except OSError as error:
            raise UsageError(f"cannot make a worker in {folder}: {error}") from None
        return config

    def text(self) -> str:
        """As `worker.toml` holds it: every key with the sentence that explains it."""
        return "# A Housecall worker. What is left out has the value shown here.\n\n" + "\n".join(_lines(self))


def _lines(table: msgspec.Struct, prefix: str = "") -> typing.Iterator[str]:
    """The lines of one table: first its values, each below its comment, then the tables within it."""
    hints = typing.get_type_hints(type(table), include_extras=True)
    inner: list[tuple[str, msgspec.Struct]] = []
    for key, hint in hints.items():
        value: Any = getattr(table, key)
        if isinstance(value, msgspec.Struct):
            inner.append((f"{prefix}{key}", value))
            continue
        meta = next(item for item in hint.__metadata__ if isinstance(item, Meta))
        yield f"# {meta.description}"
        yield tomli_w.dumps({key: value})
    for name, value in inner:
        yield from textwrap.wrap(
            typing.cast(str, type(value).__doc__), 110, initial_indent="# ", subsequent_indent="# "
        )
        yield f"[{name}]"
        yield from _lines(value, f"{name}.")
