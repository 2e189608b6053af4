"""Workers follow the caller's random generator, as a device follows `torch.manual_seed`.

NOTE [Whose random numbers]
A random operator at a worker draws from the session's own generator there. Before such a call the caller looks
at her default generator:

- she seeded it or drew from it since the last random call: its state goes to the worker, which then draws what
  she would have drawn, so a model with dropout trains alike here and there;
- she did not: the worker continues its stream. A second worker gets a stream of its own, from a seed drawn here,
  so that no two workers use the same masks.

Each random call takes one draw from the caller's generator; so seeding it again, even alike, is noticed.
"""

from __future__ import annotations

import torch

__all__ = ["Follower"]


class Follower:
    """The caller's side of one session's generator."""

    # One for the process, as torch's default generator is: its state after our own last draw, and how often the
    # caller has been seen to move it.
    _drawn: torch.Tensor | None = None
    _moves = 0

    def __init__(self) -> None:
        self._followed = -1  # the move that this worker's stream began with

    def next_state(self) -> torch.Tensor | None:
        """The state to send before a random call, `None` if the worker's generator is to go on."""
        default = torch.default_generator
        state = default.get_state()
        moved = Follower._drawn is None or not torch.equal(state, Follower._drawn)
        seed = int(torch.randint(1 << 62, ()))
        Follower._drawn = default.get_state()
        if moved:
            Follower._moves += 1
        elif self._followed == Follower._moves:
            return None
        else:
            state = torch.Generator().manual_seed(seed).get_state()
        self._followed = Follower._moves
        return state
