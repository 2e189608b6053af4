"""A worker's log: one record is one line, whatever strangers send, and nobody can flood it."""

from __future__ import annotations

import io
import logging

import pytest

from housecall.errors import WorkerGone
from housecall.host.host import Host
from housecall.logs import MOST, PER_S, OneLine, Repeats, plain
from housecall.testing import Clock, Fault, Kind, World
from housecall.worker.worker import Worker


def written(*records: logging.LogRecord, clock: Clock | None = None) -> str:
    """What a worker's handler writes of records."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(OneLine("%(name)s %(levelname)s %(message)s"))
    handler.addFilter(Repeats(clock or Clock()))
    for record in records:
        handler.handle(record)
    return stream.getvalue()


def record(text: str, *args: object, level: int = logging.WARNING, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("housecall.x", level, "x.py", 1, text, args, None)
    made.__dict__.update(extra)
    return made


FORGED = "none\n2026-11-26 10:00:00 housecall INFO release: scientist 'alice'\r\x1b[2K\u202egnitseretni\u2028\x85"


def test_a_text_of_strangers_begins_no_line() -> None:
    (line,) = written(record("no data set %s", FORGED)).splitlines()
    assert line.startswith("housecall.x WARNING no data set none\\n2026-11-26")
    assert line.isprintable()


def test_a_traceback_is_set_in() -> None:
    try:
        raise ValueError(FORGED)
    except ValueError as error:
        failed = record("it failed")
        failed.exc_info = (ValueError, error, error.__traceback__)
    first, *rest = written(failed).splitlines()
    assert first == "housecall.x WARNING it failed"
    assert rest
    assert all(line.startswith("  | ") and line.isprintable() for line in rest)


def test_letters_of_all_languages_stay() -> None:
    assert plain("Zürich, 東京 – ok") == "Zürich, 東京 – ok"


def test_the_session_stands_at_the_end() -> None:
    assert written(record("opened", session="ab12")).endswith("opened (session ab12)\n")


def test_a_flood_is_counted_and_the_rest_is_written() -> None:
    clock = Clock()
    lines = written(
        *(record("refused %d", n, principal="mallory") for n in range(MOST + 50)),
        record("refused %d", 1, principal="alice"),
        record("refused %d", 0, principal="mallory", level=logging.ERROR),
        clock=clock,
    ).splitlines()
    assert len(lines) == MOST + 2


def test_how_many_were_left_out_is_said() -> None:
    clock = Clock()
    many = Repeats(clock)
    for _ in range(MOST + 50):
        many.filter(record("again"))
    clock.advance(PER_S)
    after = record("again")
    assert many.filter(after)
    assert after.getMessage() == "[50 records like others were left out before this] again"


def test_records_of_sessions_say_whose_they_are(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with World() as world:
        (seat,) = world.host.seats
        world.faults.strike(Fault(Kind.CORRUPTED, "out"))
        with pytest.raises(WorkerGone):
            world.worker.search()
    events = {one.event: one for one in caplog.records if hasattr(one, "event")}  # type: ignore[attr-defined]
    assert {"opened", "cut", "ended"} <= set(events)
    for one in events.values():
        assert (one.worker, one.principal, one.session) == ("clinic", "me", seat.id)  # type: ignore[attr-defined]
    assert seat.token not in caplog.text


def test_records_of_refused_streams_as_well(caplog: pytest.LogCaptureFixture) -> None:
    host = Host(Worker("clinic"))
    list(host.serve(iter([b"\xff"]), "mallory"))
    (refused,) = (one for one in caplog.records if getattr(one, "event", "") == "refused")
    assert refused.principal == "mallory"  # type: ignore[attr-defined]
    host.close()
