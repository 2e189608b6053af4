"""The closed table of operators against the torch that is installed: nothing enters it or changes silently."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tool import tool

from housecall.errors import UnknownOperator
from housecall.program import ops
from housecall.program.call import Call
from housecall.program.check import check_call, written_by
from housecall.program.ops import operator, table
from housecall.program.run import overload
from housecall.types import Ref

ROOT = Path(__file__).parent.parent

of_this_torch = pytest.mark.skipif(
    not torch.__version__.startswith("2.13"), reason=f"aten.txt was written by torch 2.13, this is {torch.__version__}"
)


@of_this_torch
def test_the_table_is_what_the_tool_writes() -> None:
    found = (ROOT / "housecall" / "program" / "aten.txt").read_text().splitlines()
    expected = tool("tools/operators.py").table().splitlines()
    assert sorted(set(found) - set(expected)) == [], "in aten.txt, not in torch or refused"
    assert sorted(set(expected) - set(found)) == [], "in torch and allowed, not in aten.txt"
    assert found == expected


def test_the_table_holds_each_operator_once_and_enough_of_them() -> None:
    lines = (ROOT / "housecall" / "program" / "aten.txt").read_text().splitlines()
    assert len(lines) == len(set(lines)) == len(table())
    assert 900 < len(lines) < 1000  # as many as are needed: see tools/allowed.txt


def test_every_line_parses() -> None:
    for name, line in table().items():
        rules = operator(name)
        assert rules.name == name
        assert line.startswith(rules.schema)


def test_an_operator_is_parsed_once() -> None:
    assert operator("add.Tensor") is operator("add.Tensor")


KINDS = {"number": "Scalar", "SymInt": "int"}


def schema_of(name: str) -> Any:
    return overload(name)._schema  # type: ignore[attr-defined]


def declared(argument: Any) -> tuple[str, bool, bool, bool]:
    """Kind, many, optional, item optional: as torch's own parser has them."""
    text = str(getattr(argument, "real_type", argument.type))
    found = re.fullmatch(r"(Optional\[)?(List\[)?(Optional\[)?(\w+)\]*", text)
    assert found is not None, text
    outer, many, inner, kind = found.groups()
    return KINDS.get(kind, kind), bool(many), bool(outer), bool(many and inner)


def is_unsaid(name: str, parameter: str) -> bool:
    """Whether an operator writes to this parameter although torch's schema does not say so."""
    return name.partition(".")[0] in ops._UNSAID and parameter in ops._STATISTICS


def test_what_a_batch_norm_writes_is_known_although_its_schema_does_not_say_so() -> None:
    def statistics(name: str, *flags: Any) -> list[str]:
        x, w = Ref(1), Ref(2)
        call = Call(name, (x, w, w, Ref(3), Ref(4), *flags), {}, (5, 6, 7))
        return [param.name for param, _ in written_by(operator(name), call)]

    assert statistics("native_batch_norm.default", True, 0.1, 1e-5) == ["running_mean", "running_var"]
    assert statistics("native_batch_norm.default", False, 0.1, 1e-5) == []
    mean = torch.zeros(2)
    torch.ops.aten.native_batch_norm(torch.ones(3, 2), None, None, mean, torch.ones(2), True, 0.1, 1e-5)
    assert mean.tolist() != [0.0, 0.0]


@of_this_torch
def test_parameters_agree_with_torchs_schema() -> None:
    wrong = []
    for name in table():
        arguments = schema_of(name).arguments
        params = operator(name).params
        found = [(p.name, p.keyword, p.writes, p.required, p.kind, p.many, p.optional, p.item_optional) for p in params]
        expected = [
            (
                a.name,
                a.kwarg_only,
                (a.alias_info is not None and a.alias_info.is_write) or is_unsaid(name, a.name),
                not a.has_default_value(),
                *declared(a),
            )
            for a in arguments
        ]
        if found != expected:
            wrong.append((name, found, expected))
    assert wrong == []


@of_this_torch
def test_results_agree_with_torchs_schema() -> None:
    wrong = []
    for name in table():
        schema = schema_of(name)
        written = {
            frozenset(a.alias_info.after_set): a.name
            for a in schema.arguments
            if a.alias_info is not None and a.alias_info.is_write
        }
        expected = []
        for result in schema.returns:
            kind, many, _, _ = declared(result)
            same = ""
            if result.alias_info is not None and result.alias_info.is_write:
                same = written[frozenset(result.alias_info.after_set)]
            expected.append((kind, many, same))
        found = [(r.kind, r.many, r.same_as) for r in operator(name).returns]
        if found != expected:
            wrong.append((name, found, expected))
    assert wrong == []


@of_this_torch
def test_marks_agree_with_torchs_tags() -> None:
    wrong = []
    for name in table():
        tags = overload(name).tags  # type: ignore[attr-defined]
        rules = operator(name)
        found = (rules.random, rules.dynamic, rules.reshapes)
        expected = (
            torch.Tag.nondeterministic_seeded in tags,
            torch.Tag.dynamic_output_shape in tags,
            torch.Tag.inplace_view in tags,
        )
        if found != expected:
            wrong.append((name, found, expected))
    assert wrong == []


@pytest.mark.parametrize(
    ("name", "marks"),
    [
        ("bernoulli.default", (True, False, False)),
        ("native_dropout.default", (True, False, False)),
        ("nonzero.default", (False, True, False)),
        ("masked_select.default", (False, True, False)),
        ("t_.default", (False, False, True)),
        ("add.Tensor", (False, False, False)),
    ],
)
def test_marks_of_operators_everybody_knows(name: str, marks: tuple[bool, bool, bool]) -> None:
    rules = operator(name)
    assert (rules.random, rules.dynamic, rules.reshapes) == marks


def test_writes_and_same_as_of_operators_everybody_knows() -> None:
    assert not operator("add.Tensor").writes
    assert operator("add_.Tensor").returns[0].same_as == "self"
    assert operator("add.out").returns[0].same_as == "out"
    assert operator("add.Tensor").returns[0].same_as == ""
    assert [item.same_as for item in operator("rrelu_with_noise_.default").returns] == ["self"]
    assert operator("split.Tensor").returns[0].many
    assert operator("_foreach_add_.List").returns == ()
    assert operator("_foreach_add_.List").writes


# -- what an owner's machine never does for a stranger ----------------------------------------------------

REFUSED = {
    "reads the owner's files": ("from_file",),
    "re-points or grows a storage that others share": (
        "set_", "set_data", "resize_", "resize_as_", "_resize_output_", "resize_as_sparse_", "swap_tensors",
    ),
    "reaches past a value into its storage": (
        "as_strided", "as_strided_", "as_strided_copy", "as_strided_scatter", "_reshape_alias", "data_ptr", "data",
        "storage_offset",
    ),
    "hands out memory that others left behind": (
        "empty", "empty_like", "empty_strided", "empty_permuted", "empty_quantized", "new_empty", "new_empty_strided",
        "_empty_affine_quantized", "_empty_per_channel_affine_quantized",
    ),
    "sets the owner's randomness": ("manual_seed", "seed", "initial_seed"),
    "loops as often as an argument says": (
        "_sobol_engine_draw", "_sobol_engine_ff_", "_sobol_engine_initialize_state_", "_sobol_engine_scramble_",
    ),
    "writes without looking how much there is to write to": ("_cummax_helper", "_cummin_helper"),
    "is about the machine, not about values": (
        "record_stream", "pin_memory", "_pin_memory", "is_pinned", "get_device", "_cuda_getCurrentRawStream", "_print",
        "_assert_async", "_assert_tensor_metadata", "_debug_has_internal_overlap", "_make_dep_token", "sym_size",
        "_test_optional_intlist", "_triton_scaled_dot_attention", "_cudnn_rnn", "cudnn_convolution",
        "_use_cudnn_ctc_loss",
    ),
    "is torch's own way to copy and share": (
        "_copy_from", "_copy_from_and_resize", "_lazy_clone", "_efficientzerotensor",
    ),
    "is autograd's, which runs at the caller": (
        "detach_", "requires_grad_", "retain_grad", "_backward", "backward",
    ),
    "is of a layout or name that does not travel": (
        "_validate_sparse_coo_tensor_args", "_sparse_coo_tensor_unsafe", "_to_sparse", "to_mkldnn",
        "quantize_per_tensor", "_nested_tensor_from_mask", "rename_", "align_to",
    ),
}  # fmt: skip
DANGEROUS = [name for names in REFUSED.values() for name in names]


def test_what_resizes_by_what_it_finds_is_absent() -> None:
    """`nonzero.out` would give its `out` the size that the elements of another tensor say."""
    assert [name for name in table() if operator(name).dynamic and name.endswith("out")] == []


@pytest.mark.parametrize("base", DANGEROUS)
def test_what_is_dangerous_is_absent_and_refused_by_name(base: str) -> None:
    assert [name for name in table() if name.partition(".")[0] == base] == []
    for name in (f"{base}.default", base, f"{base}.out"):
        with pytest.raises(UnknownOperator) as caught:
            operator(name)
        assert f"operator '{name}' is not in the table of allowed operators" in str(caught.value)
        with pytest.raises(UnknownOperator, match=re.escape(f"'{name}'")):
            overload(name)
        with pytest.raises(UnknownOperator, match=re.escape(f"'{name}'")):
            check_call(Call(name, (Ref(1),), {}, (2,)))


@pytest.mark.parametrize(
    "part",
    ["storage", "sparse", "quantize", "nested", "generator", "pinned", "from_file", "as_strided", "resize", "empty"],
)
def test_no_operator_of_a_dangerous_family_is_in_the_table(part: str) -> None:
    assert [name for name in table() if part in name.partition(".")[0]] == []


@pytest.mark.parametrize(
    "name",
    ["__class__", "__init__.default", "add.__class__", "add.Tensor.default", "aten::add.Tensor", "", ".", "os.system",
     "add.Tensor ", "ADD.Tensor", "add.Tensor\n", "prim.print"],
)  # fmt: skip
def test_what_is_no_operator_is_refused(name: str) -> None:
    with pytest.raises(UnknownOperator, match="is not in the table of allowed operators"):
        operator(name)


def test_no_parameter_takes_what_could_carry_code() -> None:
    kinds = {param.kind for name in table() for param in operator(name).params}
    assert kinds <= {
        "Tensor", "int", "float", "bool", "complex", "Scalar", "str", "ScalarType", "Device", "Layout", "MemoryFormat",
        "Generator",
    }  # fmt: skip


@pytest.mark.parametrize("page", ["README.md", "docs/operators.md", "docs/design.md"])
def test_pages_say_how_many_there_are(page: str) -> None:
    text = (ROOT / page).read_text()
    assert re.search(rf"(?<![\d,]){len(table()):,}(?![\d,])", text), f"{page} does not say {len(table()):,}"
