"""`.safetensors`: tensors as they lie, mapped into memory instead of read. The format's own library checks its header
against the length of the file (https://github.com/huggingface/safetensors, "Format")."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from .records import Records, Request

__all__ = ["read_safetensors"]


def read_safetensors(path: Path, request: Request) -> Records:
    """Each tensor is a column of its own name; their memory is the file's, so that it need not fit into RAM."""
    with safe_open(path, framework="pt") as file:
        names = sorted(file.keys())
        columns = {name: file.get_tensor(name) for name in names if request.wants(name)}
    return Records(columns, left_out=tuple(name for name in names if name not in columns))
