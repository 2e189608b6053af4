"""The worker: an interpreter of messages at the data's side. `handle` is the only door in.

It imports, evaluates and unpickles nothing that arrives: operators, dtypes and messages are looked up in
closed tables. A failure is an answer, never an exception to the transport.
"""

from __future__ import annotations

import threading

import torch

from ..program.call import HOLE, Call
from ..program.run import Randomness, computing, execute
from ..program.typing import type_of
from ..types import TensorType
from ..wire.messages import (
    Array,
    Clear,
    Describe,
    Drop,
    Failure,
    Fetch,
    Found,
    Frame,
    Message,
    Put,
    Reply,
    Result,
    Search,
    Seed,
    Tag,
    Types,
    Value,
)
from .release import release
from .store import Failed, Missing, Store

__all__ = ["Worker", "WorkerSession"]


class Worker:
    """Holds data and computes on it, for any number of sessions that cannot see each other."""

    def __init__(self, id: str) -> None:
        self.id = id
        self.sessions: list[WorkerSession] = []
        self._lock = threading.Lock()

    def open(self, principal: str) -> WorkerSession:
        """Begin a session for `principal`: an empty store, its own order, its own randomness."""
        session = WorkerSession(self, principal)
        with self._lock:
            self.sessions.append(session)
        return session

    def leave(self, session: WorkerSession) -> None:
        """End a session and free what it held."""
        session.store.clear()
        with self._lock:
            if session in self.sessions:
                self.sessions.remove(session)


class WorkerSession:
    """The worker's side of one session: a `Door`."""

    def __init__(self, worker: Worker, principal: str) -> None:
        self.worker = worker
        self.principal = principal
        self.store = Store()
        self.randomness = Randomness()

    def close(self) -> None:
        """End the session."""
        self.worker.leave(self)

    def handle(self, frame: Frame) -> Reply:
        """Do what the frame says, in order. Autograd runs at the caller, so no graph is built here."""
        results: list[Result] = []
        failures: list[Failure] = []
        store, randomness = self.store, self.randomness
        with computing():
            for index, message in enumerate(frame.messages):
                kind = type(message)
                try:
                    if kind is Call:
                        execute(message, store, randomness)  # type: ignore[arg-type]  # `kind` says it is a Call
                    elif kind is Drop:
                        store.pop(message.id, None)  # type: ignore[union-attr]  # as above
                    else:
                        self._answer(message, results)
                except Exception as error:  # what a message does must not end the session
                    self._fail(frame.number, index, message, error, failures)
        return Reply(frame.number, tuple(results), tuple(failures))

    def _answer(self, message: Message, results: list[Result]) -> None:
        match message:
            case Put(id=ref, value=value):
                self.store[ref] = value.data
            case Fetch(ids=ids):
                results.append(Value(tuple(self._released(ref) for ref in ids)))
            case Describe(ids=ids):
                results.append(Types(tuple(self._described(ref) for ref in ids)))
            case Seed(state=state):
                self.randomness.follow(state.data)
            case Tag(id=ref):
                _ = self.store[ref]  # tagging what is not there must fail now, not at the search
                self.store.tags[ref] = message
            case Search(tags=tags):
                results.append(Found(self.store.search(tags, type_of)))
            case Clear():
                self.store.clear()

    def _released(self, ref: int) -> Array | Failure:
        value = self._held(ref)
        return value if isinstance(value, Failure) else release(value)

    def _described(self, ref: int) -> TensorType | Failure | None:
        if ref not in self.store:  # a hole: the operator gave nothing there
            return None
        value = self._held(ref)
        return value if isinstance(value, Failure) else type_of(value)

    def _held(self, ref: int) -> torch.Tensor | Failure:
        try:
            value = self.store[ref]
        except Missing as error:
            return Failure(0, 0, "fetch", str(error), writes=False)
        return value.failure if isinstance(value, Failed) else value

    def _fail(self, frame: int, index: int, message: Message, error: Exception, failures: list[Failure]) -> None:
        """Fill the outputs of what failed with the failure. A write that fails leaves the value as torch left it
        (`index_fill_` may have written some rows), and says so in the reply: nobody might read it and notice."""
        writes = isinstance(message, Call) and not message.outs
        if isinstance(error, Failed):  # an argument had failed: the cause is what the caller wants to read
            cause = error.failure
            failure = Failure(cause.frame, cause.index, cause.operator, cause.reason, writes)
        else:
            name = message.op if isinstance(message, Call) else type(message).__name__.lower()
            failure = Failure(frame, index, name, f"{type(error).__name__}: {error}", writes)
        failures.append(failure)
        outs = message.outs if isinstance(message, Call) else (message.id,) if isinstance(message, Put) else ()
        for out in outs:
            if out != HOLE:
                self.store[out] = Failed(failure)
