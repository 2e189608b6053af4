"""Every error that Housecall raises, in one tree.

    HousecallError
    ├── UsageError (ValueError)            the request cannot be meant as written
    │   ├── PlaceError                     tensors of two places in one operation
    │   └── SpentPointerError              a pointer used after its value came home
    ├── ProgramError (ValueError)          a program breaks a rule; names the call
    │   └── UnknownOperator                an operator that is not in the closed table
    ├── OperatorError (RuntimeError)       an operator failed at its worker
    ├── LimitError                         more than a worker's owner lets one session use
    ├── ProtocolError                      bytes or messages that no honest peer would send
    │   └── CodecError                     bytes that are not a message
    ├── WorkerGone (ConnectionError)       a worker that cannot answer any more
    ├── IdentityError                      who somebody is was not shown, or is refused
    ├── PolicyError (ValueError)           an owner's rule, key or approval that is missing, damaged or another's
    ├── LedgerError                        a ledger that is damaged, or cannot be written: nothing leaves
    └── DataError                          a data set that is missing, damaged or unfit

A message says which thing, what was found, what was expected, and what to do next.
"""

from __future__ import annotations

__all__ = [
    "CodecError",
    "DataError",
    "HousecallError",
    "IdentityError",
    "LedgerError",
    "LimitError",
    "OperatorError",
    "PlaceError",
    "PolicyError",
    "ProgramError",
    "ProtocolError",
    "SpentPointerError",
    "UnknownOperator",
    "UsageError",
    "WorkerGone",
]


class HousecallError(Exception):
    """The root: `except HousecallError` catches all that this package raises on purpose."""


class UsageError(HousecallError, ValueError):
    """A request that cannot be meant as written; nothing was sent."""


class PlaceError(UsageError):
    """Tensors that live in different places met in one operation."""


class SpentPointerError(UsageError):
    """A pointer was used after `.get()` or `.move()` took its value away."""


class ProgramError(HousecallError, ValueError):
    """A program breaks a rule of `program.check`; the text names the call."""


class UnknownOperator(ProgramError):
    """An operator outside the closed table: refused by name, before anything runs."""


class OperatorError(HousecallError, RuntimeError):
    """An operator failed at its worker.

    `worker`, `operator` and `site` ("file:line in function: source") say where it ran, what ran and
    which of the caller's lines issued it: the line that caused the error, not the one that noticed it.
    """

    def __init__(self, worker: str, operator: str, reason: str, site: str = "") -> None:
        self.worker, self.operator, self.reason, self.site = worker, operator, reason, site
        issued = f"\n  issued at {site}" if site else ""
        super().__init__(f"{operator} failed at worker '{worker}': {reason}{issued}")


class LimitError(HousecallError):
    """More memory, slots or computing time than a worker's owner lets one session use: refused before it ran."""


class ProtocolError(HousecallError):
    """A message that no honest peer would send."""


class CodecError(ProtocolError):
    """Bytes that are not a message of this protocol."""


class WorkerGone(HousecallError, ConnectionError):
    """The worker cannot answer any more; its values are lost, the caller's are not."""


class IdentityError(HousecallError):
    """Who somebody is was not shown, or is refused: a key, certificate, invitation or revocation list that is missing,
    damaged, over, or another's."""


class PolicyError(HousecallError, ValueError):
    """An owner's rule, key or approval that is missing, damaged, over, or not the owner's."""


class LedgerError(HousecallError):
    """A ledger that was changed, cut or damaged, or cannot be written: what must be in it first does not happen."""


class DataError(HousecallError):
    """A data set that is missing, damaged, or unfit for what was asked of it."""
