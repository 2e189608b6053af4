"""A hospital's owner, in a process of her own: reads what is asked, and answers.

    python owner.py FOLDER                      she reads each request, and is asked
    python owner.py FOLDER --answer approve     the story's owners, for a test: the answer is given already

`housecall worker requests | show N | approve N | deny N` do the same, one at a time. The private key is read here, by
the owner, and never by her worker.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from housecall.owner.approvals import Request, Requests
from housecall.owner.signing import OwnerKey, public_key


def main() -> None:
    """Wait for requests and answer them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the worker's folder")
    parser.add_argument("--answer", choices=["ask", "approve", "approve-then-deny", "deny"], default="ask")
    parser.add_argument("--reason", default="this is more than we agreed on", help="of a denial")
    parser.add_argument("--count", type=int, default=1, help="how many requests to answer")
    parser.add_argument("--minutes", type=float, default=10, help="how long to wait for each")
    given = parser.parse_args()
    requests = Requests(given.folder, public_key(given.folder))
    for number in range(given.count):
        request = _next(requests, given.minutes)
        _show(request)
        if _approves(given.answer, number):
            key = OwnerKey.load(given.folder)
            requests.approve(request.id, key, request.runs, release=request.kind == "program")
            print("approved, for 24 hours", flush=True)
        else:
            requests.deny(request.id, given.reason)
            print(f"denied: {given.reason}", flush=True)


def _next(requests: Requests, minutes: float) -> Request:
    """The request that has waited longest."""
    deadline = time.monotonic() + 60 * minutes
    while not (pending := requests.pending()):
        if time.monotonic() > deadline:
            raise SystemExit("nobody asks for anything")
        time.sleep(0.1)
    return pending[0]


def _show(request: Request) -> None:
    what = f"to run a program ({request.runs} times) on" if request.kind == "program" else "to take a value of"
    print(f"request {request.id}: {request.role} '{request.principal}' asks {what} {' + '.join(request.data_sets)}")
    print(f"because: {request.reason}")
    print(request.program)


def _approves(answer: str, number: int) -> bool:
    if answer == "ask":
        return input("Approve it, and that what comes of it leaves? [y/N] ").strip().lower() == "y"
    return answer == "approve" or (answer == "approve-then-deny" and number == 0)


if __name__ == "__main__":
    main()
