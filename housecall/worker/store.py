"""What one session keeps at a worker: id -> value or failure, and the tags it gave. It ends with the session."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ProtocolError
from ..wire.messages import Failure, Info, Tag

__all__ = ["Failed", "Missing", "Store"]


class Failed(Exception):
    """Stands in the place of a value whose call failed; reading it raises it."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


class Missing(ProtocolError):
    """An id that this session does not hold."""


class Store(dict[int, Any]):
    """The slots of one session: a dict, since a call reads and binds ids and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: dict[int, Tag] = {}

    def __missing__(self, ref: int) -> Any:
        raise Missing(f"no slot {ref} in this session: it was dropped, or belongs to another worker or session")

    def clear(self) -> None:
        """Free every slot."""
        super().clear()
        self.tags.clear()

    def tensors(self) -> dict[int, torch.Tensor]:
        """The values, without the failures."""
        return {ref: value for ref, value in self.items() if isinstance(value, torch.Tensor)}

    def search(self, tags: tuple[str, ...], types: Any) -> tuple[Info, ...]:
        """The tagged slots that carry all of `tags`, in order of tagging; `types(value)` gives their types."""
        self.tags = {ref: tag for ref, tag in self.tags.items() if ref in self}
        return tuple(
            Info(ref, types(self[ref]), tag.tags, tag.description)
            for ref, tag in self.tags.items()
            if set(tags) <= set(tag.tags) and isinstance(self[ref], torch.Tensor)
        )
