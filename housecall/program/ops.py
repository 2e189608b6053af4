"""The closed table of allowed operators and their rules. What is not in `aten.txt` cannot be said.

Each line of that file is torch's own schema, plus the marks a schema does not hold:

    random      draws from the worker's generator
    dynamic     the shape of a result depends on the elements of an input (`nonzero`)
    reshapes    changes the size or stride of its first argument in place (`t_`)

`tools/operators.py` writes the file and says what is refused; a test holds every line against the torch that
is installed. This file knows neither torch nor values: an auditor's tool can read the table without them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from importlib import resources
from typing import Literal

import msgspec

from ..errors import UnknownOperator

__all__ = ["Operator", "Param", "Return", "operator", "table"]

Kind = Literal[
    "Tensor", "int", "float", "bool", "complex", "Scalar", "str", "ScalarType", "Device", "Layout", "MemoryFormat",
    "Generator",
]  # fmt: skip


class Param(msgspec.Struct, frozen=True):
    """One parameter of an operator. `writes`: the operator changes this tensor in place, but not where the flag `if_`,
    if it is named, is false."""

    name: str
    kind: Kind
    many: bool = False
    optional: bool = False
    item_optional: bool = False
    writes: bool = False
    keyword: bool = False
    required: bool = True
    if_: str = ""


class Return(msgspec.Struct, frozen=True):
    """One result of an operator. `same_as` names the parameter it *is* (`add_` returns `self`), `view_of` the one
    whose storage it may share (`t`)."""

    kind: Kind
    many: bool = False
    same_as: str = ""
    view_of: str = ""


class Operator(msgspec.Struct, frozen=True):
    """The rules of one ATen overload. `schema` is torch's text, without the namespace."""

    name: str
    schema: str
    params: tuple[Param, ...]
    returns: tuple[Return, ...]
    random: bool
    dynamic: bool
    reshapes: bool

    @property
    def writes(self) -> bool:
        """Whether the operator changes any of its arguments."""
        return any(param.writes for param in self.params)

    @property
    def in_place(self) -> bool:
        """Whether the operator writes to its arguments and makes nothing else: no `out`, which it would resize."""
        outs = any(param.writes and param.keyword for param in self.params)
        return self.writes and not outs and all(item.same_as for item in self.returns)


def operator(name: str) -> Operator:
    """The rules of `name` ("add.Tensor"). Raises `UnknownOperator` for what the table does not hold."""
    try:
        line = table()[name]
    except KeyError:
        raise UnknownOperator(
            f"operator '{name}' is not in the table of allowed operators (housecall/program/aten.txt); "
            "write it with others, or get the value with .get() and compute at home"
        ) from None
    return _parse(line)


@functools.cache
def table() -> Mapping[str, str]:
    """Operator name -> line of `aten.txt`, for every allowed operator."""
    lines = resources.files(__package__).joinpath("aten.txt").read_text().splitlines()
    return {_named(line.partition("(")[0]): line for line in lines}


def _named(text: str) -> str:
    return text if "." in text else f"{text}.default"


# Operators that write to these two though their schemas do not say so, and the flag that makes them do it.
_STATISTICS = frozenset(("running_mean", "running_var"))
_UNSAID = {"native_batch_norm": "training"}


# Operators whose results are, or may be, views of this argument though their schemas do not say so. A test looks for
# more among the calls of torch's own database.
_HIDDEN_VIEWS = {
    "_unsafe_view": "self",
    "conj_physical": "self",
    "unsafe_split": "self",
    "unsafe_split_with_sizes": "self",
}


def _unsaid(name: str, param: Param) -> Param:
    flag = _UNSAID.get(name.partition(".")[0])
    if flag is None or param.name not in _STATISTICS:
        return param
    return msgspec.structs.replace(param, writes=True, if_=flag)


@functools.cache
def _parse(line: str) -> Operator:
    schema, _, marks = line.partition("  # ")
    name, _, rest = schema.partition("(")
    params_text, _, returns_text = rest.rpartition(" -> ")
    params = tuple([_unsaid(name, param) for param in _params(_split(params_text.strip().removesuffix(")")))])
    owners = {alias[1]: param for alias, param in zip(_aliases(params_text), params, strict=True) if alias}
    returns = tuple([_return(text, owners) for text in _split(_unwrapped(returns_text))])
    hidden = _HIDDEN_VIEWS.get(name.partition(".")[0])
    if hidden:
        returns = tuple([item if item.same_as else msgspec.structs.replace(item, view_of=hidden) for item in returns])
    return Operator(
        name=_named(name),
        schema=schema,
        params=params,
        returns=returns,
        random="random" in marks,
        dynamic="dynamic" in marks,
        reshapes="reshapes" in marks,
    )


def _unwrapped(text: str) -> str:
    """Several results stand in brackets, one does not."""
    return text[1:-1] if text.startswith("(") else text


def _split(text: str) -> list[str]:
    """Split at the commas that no bracket encloses."""
    parts, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += (char in "([") - (char in ")]")
        if char == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


_TYPE = re.compile(r"(?P<kind>\w+)(?P<alias>\([^)]*\))?(?P<inner>\?)?(?P<many>\[\d*\])?(?P<outer>\?)?")
_KINDS = {"SymInt": "int", "number": "Scalar"}


def _type(text: str) -> re.Match[str]:
    found = _TYPE.fullmatch(text)
    if found is None:
        raise UnknownOperator(f"aten.txt: cannot read the type '{text}'; write the file anew with tools/operators.py")
    return found


def _params(texts: list[str]) -> list[Param]:
    params, keyword = [], False
    for text in texts:
        if text == "*":
            keyword = True
            continue
        declared, _, default = text.partition("=")
        type_text, _, name = declared.rpartition(" ")
        found = _type(type_text)
        many = bool(found["many"])
        params.append(
            Param(
                name=name,
                kind=_KINDS.get(found["kind"], found["kind"]),  # type: ignore[arg-type]  # a test reads every line
                many=many,
                optional=bool(found["outer"] or (found["inner"] and not many)),
                item_optional=bool(found["inner"] and many),
                writes="!" in (found["alias"] or ""),
                keyword=keyword,
                required=not default,
            )
        )
    return params


def _aliases(params_text: str) -> list[str]:
    """The alias mark of each parameter ("(a)", "(a!)", "(a -> *)"), empty for most."""
    texts = [text for text in _split(params_text.strip().removesuffix(")")) if text != "*"]
    return [_type(text.partition("=")[0].rpartition(" ")[0])["alias"] or "" for text in texts]


def _return(text: str, owners: Mapping[str, Param]) -> Return:
    found = _TYPE.match(text)
    assert found is not None, f"aten.txt: cannot read the result '{text}'"
    kind = _KINDS.get(found["kind"], found["kind"])
    owner = owners.get(found["alias"][1]) if found["alias"] else None
    name = owner.name if owner else ""
    same = bool(owner and owner.writes)
    many = bool(found["many"])
    return Return(kind, many, same_as=name if same else "", view_of="" if same else name)  # type: ignore[arg-type]  # as above
