"""Write `housecall/program/aten.txt`, the closed table of operators, from the installed torch.

Run it after an upgrade of torch, then *read the diff*: each line added is one more thing that a stranger may
ask an owner's machine to do. `python tools/operators.py`
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

TABLE = Path(__file__).parent.parent / "housecall" / "program" / "aten.txt"

# What a data owner's machine never does for a stranger, and why.
REFUSED = re.compile(
    r"""^(
      empty | empty_\w+ | new_empty\w* | _empty_\w+               # would read memory that others left behind
    | resize\w* | _resize\w* | set | set_\w* | set_data | swap_tensors   # would re-point or grow a storage
    | as_strided\w* | _efficientzerotensor                     # would reach past a value, or have no storage
    | _sobol_engine\w*                                         # loops as often as an argument says
    | _cum(max|min)_helper                                     # write without looking how much there is to write to
    | from_file | _?\w*storage\w* | data | data_ptr | record_stream | .*pin_memory\w* | is_pinned
    | manual_seed | seed | initial_seed | .*_generator\w*         # the owner's randomness is its own
    | \w*cudnn\w* | _?miopen\w* | \w*mps\w* | \w*fbgemm\w* | _cuda_\w+ | _conv_depthwise2d | _triton\w*
    | _test_\w+ | _debug\w* | _print | _assert\w* | _functional_\w+ | sym_\w+ | _async\w* | _wait\w*
    | backward | _backward | retain_grad | requires_grad_ | _version | output_nr | is_leaf | retains_grad
    | _fw_primal\w* | _make_dual\w* | _unpack_dual | _has_\w+ | detach_ | _reshape_alias\w*
    | rename\w* | refine_names | align_\w+ | .*names | to_here | confirmed_by_owner | owner\w* | _validate_\w+
    | .*sparse\w* | .*quantize\w* | q_\w+ | _make_per_\w+ | \w*_?quantized\w*
    | fake_quantize\w* | _fake_quantize\w*
    | .*nested\w* | _jagged\w* | _padded_dense\w* | .*mkldnn_(?!rnn)\w* | to_dense\w* | _to_dense\w*
    | _coalesce\w* | coalesce | is_coalesced | _indices\w* | _values\w* | indices\w* | values\w*
    | c?(row|col)_indices\w* | ccol_indices\w* | sspaddmm\w* | hspmm\w* | _spdiags\w* | to_padded\w*
    | _spsolve | _dimI | _dimV | dense_dim | _nnz
    | _foobar | _cufft\w* | _lazy_clone | _amp\w* | _dirichlet\w* | _mixed_dtypes\w* | is_distributed | _propagate\w*
    | \w*to_mkldnn | smm | _copy_from\w* | _(add|remove)_batch_dim | _make_dep_token | get_device
    | vulkan\w* | is_vulkan\w* | _convert_weight\w* | _weight_int\w* | _scaled_grouped\w*
    )$""",
    re.X,
)
KINDS = {
    "Tensor", "int", "bool", "float", "number", "complex", "str", "ScalarType", "Device", "Layout", "MemoryFormat",
    "Generator",
}  # fmt: skip


def kind(type_text: str) -> str:
    """The innermost type of a schema's argument: `List[Optional[Tensor]]` -> `Tensor`."""
    return re.sub(r"(List|Optional)\[|\]", "", type_text)


def allowed(schema: torch.FunctionSchema) -> bool:
    """Tensors in or out, only kinds of argument that travel, and not refused by name."""
    name = schema.name.removeprefix("aten::")
    kinds = {kind(str(value.type)) for value in (*schema.arguments, *schema.returns)}
    makes = {kind(str(value.type)) for value in schema.returns}
    takes = {kind(str(value.type)) for value in schema.arguments}
    named = "Dimname" in str(schema)
    return "Tensor" in (makes | takes) and kinds <= KINDS and not named and not REFUSED.match(name)


def line(name: str, overload: str) -> str | None:
    """One line of the table: torch's schema, then the marks that no schema holds."""
    try:
        operator = getattr(getattr(torch.ops.aten, name), overload)
    except AttributeError:  # a schema that only TorchScript can call
        return None
    if not allowed(operator._schema):
        return None
    dynamic = torch.Tag.dynamic_output_shape in operator.tags
    if dynamic and overload.endswith("out"):  # would resize what it is given by what it finds in it
        return None
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
