"""Write `housecall/program/aten.txt`, the closed table of operators, from the installed torch and `tools/allowed.txt`.

Run it after an upgrade of torch, then *read the diff*: each line added is one more thing that a stranger may
ask an owner's machine to do. `python tools/operators.py`
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch

TABLE = Path(__file__).parent.parent / "housecall" / "program" / "aten.txt"
ALLOWED = Path(__file__).parent / "allowed.txt"
OUT = {"add.out", "maximum.out"}  # forms with `out` that torch itself calls

KINDS = {
    "Tensor", "int", "bool", "float", "number", "complex", "str", "ScalarType", "Device", "Layout", "MemoryFormat",
    "Generator",
}  # fmt: skip


def kind(type_text: str) -> str:
    """The innermost type of a schema's argument: `List[Optional[Tensor]]` -> `Tensor`."""
    return re.sub(r"(List|Optional)\[|\]", "", type_text)


def base(name: str) -> str:
    """The name of an operator without its overload and the mark of its form in place."""
    plain = name.partition(".")[0]
    return plain.removesuffix("_") if not plain.endswith("__") else plain


def allowed(schema: torch.FunctionSchema, names: frozenset[str]) -> bool:
    """Of an allowed name, with kinds of argument that travel, and no `out`."""
    name = schema.name.removeprefix("aten::")
    kinds = {kind(str(value.type)) for value in (*schema.arguments, *schema.returns)}
    writes = any(arg.alias_info and arg.alias_info.is_write and arg.kwarg_only for arg in schema.arguments)
    if writes and f"{name}.{schema.overload_name}" not in OUT:
        return False
    return (
        (base(name) in names or name in names)
        and kinds <= KINDS
        and "Dimname" not in str(schema)
        and not name.startswith("sym_")
    )


@functools.cache
def allowed_names() -> frozenset[str]:
    """What `allowed.txt` lists."""
    return frozenset(line for line in ALLOWED.read_text().splitlines() if line and not line.startswith("#"))


def line(name: str, overload: str) -> str | None:
    """One line of the table: torch's schema, then the marks that no schema holds."""
    try:
        operator = getattr(getattr(torch.ops.aten, name), overload)
    except AttributeError:  # a schema that only TorchScript can call
        return None
    if not allowed(operator._schema, allowed_names()):
        return None
    dynamic = torch.Tag.dynamic_output_shape in operator.tags
    marks = []
    if torch.Tag.nondeterministic_seeded in operator.tags:
        marks.append("random")
    if dynamic:
        marks.append("dynamic")
    if torch.Tag.inplace_view in operator.tags:
        marks.append("reshapes")
    schema = str(operator._schema).removeprefix("aten::")
    return f"{schema}  # {' '.join(marks)}" if marks else schema


def table() -> str:
    """The whole file: sorted, one operator a line."""
    found = set()
    for full in torch._C._dispatch_get_all_op_names():
        if full.startswith("aten::"):
            name, _, overload = full.removeprefix("aten::").partition(".")
            found.add(line(name, overload or "default"))
    return "\n".join(sorted(filter(None, found), key=str.lower)) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table())
    print(f"{TABLE.name}: {len(TABLE.read_text().splitlines())} operators, torch {torch.__version__}")
