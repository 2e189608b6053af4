"""`housecall worker status`: what a worker that runs says of itself."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import UsageError
from ..host.config import Config
from ..host.lock import is_held
from .worker import Folder, worker_folder

__all__ = ["status"]

STATUS_FILE = "status.json"
LATE_S = 10.0  # it says something each second


def status(
    folder: Folder = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Show whether the worker runs, its sessions, and what it has done."""
    place = worker_folder(folder)
    name = Config.load(place).name
    found = read_status(place)
    if found is None:
        if as_json:
            typer.echo(json.dumps({"worker": name, "running": False}))
        else:
            typer.echo(f"worker '{name}' does not run: `housecall worker up --folder {place}` starts it")
        raise typer.Exit(1)
    if as_json:
        typer.echo(json.dumps({"running": True, **found}))
        return
    _show(Console(), found)


def read_status(folder: Path) -> dict[str, Any] | None:
    """What the worker in `folder` last said of itself, `None` if it does not run."""
    path = folder / STATUS_FILE
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        pid = int(found["pid"])
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; ask as the user that the worker runs as") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({error}): delete it, a worker that runs writes it anew") from None
    return found if _runs(folder, pid) else None


def _runs(folder: Path, pid: int) -> bool:
    """Whether the worker of this folder runs: its lock says so, since its number may be another process's by now."""
    try:
        return is_held(folder)
    except PermissionError:  # somebody else's: then the number has to do
        return Path(f"/proc/{pid}").exists()


def _show(console: Console, found: dict[str, Any]) -> None:
    counters: Counter[str] = Counter(found["counters"])
    tls = "mutual TLS" if found["tls"] else "[red]plain text[/red]"
    console.print(
        f"[b]{found['worker']}[/b] at {found['address']} ({tls}), process {found['pid']}, "
        f"up {_lasting(found['now'] - found['started'])}, as of {_lasting(time.time() - found['now'])} ago"
    )
    console.print(
        f"{counters['frames']:,} frames, {counters['messages']:,} messages, {found['busy_s']:.1f} s computing with "
        f"{found['threads']} threads on {found['device']}, peak memory {found['memory_mb']:,} MB"
    )
    console.print(
        f"{counters['sessions']:,} sessions opened, {counters['resumed']:,} resumed, {counters['expired']:,} expired, "
        f"{counters['refused']:,} refused"
    )
    console.print(
        f"{counters['failed_calls']:,} calls failed, of which {counters['refused_calls']:,} were refused "
        "(limits, policies, unknown operators)"
    )
    for line in _troubles(found):
        console.print(line)
    for name, said in found.get("budgets", {}).items():
        console.print(escape(f"budget of '{name}': {said}"))
    for line in _sandbox(found.get("sandbox", ())):
        console.print(line)
    if not found["sessions"]:
        console.print("no sessions now")
        return
    table = Table("principal", "connected", "slots", "MB", "frames", "waiting")
    for session in found["sessions"]:
        table.add_row(
            session["principal"],
            "yes" if session["connected"] else "away",
            f"{session['slots']:,}",
            f"{session['mb']:,}",
            f"{session['frames']:,}",
            f"{session['waiting']:,}",
        )
    console.print(table)


def _troubles(found: Mapping[str, Any]) -> Iterator[str]:
    """What its owner should know: that it died, that its certificate ends."""
    if found.get("restarts"):
        yield f"[red]started anew {found['restarts']} times[/red]: the last one {escape(found.get('died', ''))}"
    late = time.time() - found["now"]
    if late > LATE_S:
        yield f"[red]it has said nothing for {_lasting(late)}[/red]: it is stopped, or its disk is full: see its log"
    certificate = found.get("certificate")
    if certificate is not None:
        until = f"{datetime.fromtimestamp(certificate['until'], UTC):%Y-%m-%d %H:%M} UTC"
        left = certificate["until"] - time.time()
        if left <= 0:
            yield f"[red]its certificate ended {until}[/red]: nobody can connect; ask for a new invitation"
        elif certificate["trouble"]:
            yield f"[red]its certificate ends {until}[/red], in {_lasting(left)}: {escape(certificate['trouble'])}"
        elif not certificate["authority"]:
            yield f"[red]its certificate ends {until}[/red], and nobody says where the authority is that renews it"
        else:
            yield f"certificate until {until}, renewed before by {certificate['authority']}"


def _sandbox(protections: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line of what is in force, and one for each protection that is not."""
    if not protections:
        yield "sandbox: [red]none[/red], it was not started by `housecall worker up`"
        return
    active = ", ".join(one["name"] for one in protections if one["active"])
    yield f"sandbox: {active or '[red]none[/red]'}"
    for one in protections:
        if not one["active"]:
            yield f"[red]not in force: {one['name']}[/red]: {escape(one['detail'])}"


def _lasting(seconds: float) -> str:
    minutes, rest = divmod(int(max(0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
