"""`out=` on pointers: what torch's own gives, in the very tensor that was given; never resized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import housecall as hc
from housecall.owner.policy import Policy
from housecall.pointers.out import rewritten
from housecall.program.ops import table

FIXED = settings(deadline=None, database=None, derandomize=True, max_examples=25)

# Of a matrix and `out`; one row, of as many columns, is what the results of some look like.
CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda x, out: torch.add(x, 2, alpha=3, out=out),
    "sub": lambda x, out: torch.sub(x, x[0], out=out),
    "mul": lambda x, out: torch.mul(x, 0.3, out=out),
    "div": lambda x, out: torch.div(x, 3, out=out),
    "div, floor": lambda x, out: torch.div(x, 3, rounding_mode="floor", out=out),
    "exp": lambda x, out: torch.exp(x, out=out),
    "clamp": lambda x, out: torch.clamp(x, -1, 1, out=out),
    "where": lambda x, out: torch.where(x > 0, x, -x, out=out),
    "cumsum": lambda x, out: torch.cumsum(x, 0, out=out),
    "cat": lambda x, out: torch.cat([x[:1], x[1:]], out=out),
    "softmax": lambda x, out: torch.softmax(x, 1, out=out),
    "sum": lambda x, out: torch.sum(x, 1, keepdim=True, out=out),
    "mean": lambda x, out: torch.mean(x, 0, out=out),
    "amax": lambda x, out: torch.amax(x, 0, out=out),
    "matmul": lambda x, out: torch.matmul(x, x.t(), out=out),
    "mv": lambda x, out: torch.mv(x, x[0], out=out),
    "gather": lambda x, out: torch.gather(x, 0, torch.zeros_like(x, dtype=torch.long), out=out),
    "linalg.norm": lambda x, out: torch.linalg.vector_norm(x, 2, 0, out=out),
    "equal to": lambda x, out: torch.eq(x, 0.5, out=out),
}
SEVERAL: dict[str, Callable[[Any, Any], Any]] = {
    "max": lambda x, out: torch.max(x, 0, out=out),
    "sort": lambda x, out: torch.sort(x, stable=True, out=out),
    "topk": lambda x, out: torch.topk(x, 1, out=out),
    "qr": lambda x, out: torch.linalg.qr(x, out=out),
    "unbind_copy": lambda x, out: torch.unbind_copy(x, out=list(out)),
}

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool])
ROWS, COLUMNS = st.integers(1, 4), st.integers(1, 4)


def alike(value: torch.Tensor, dtype: torch.dtype, dense: bool) -> torch.Tensor:
    """A tensor that can be `out` of what gives `value`: its memory in the order of rows, or of columns."""
    shape = value.shape if dense else value.shape[::-1]
    made = torch.full(shape, 7, dtype=dtype)
    return made if dense else made.permute(*reversed(range(value.dim())))


def refused(call: Callable[[Any, Any], Any], x: Any, out: Any) -> bool:
    try:
        assert call(x, out) is out
        if isinstance(out, hc.PointerTensor):
            out.copy().get()  # what only the worker refuses
    except (RuntimeError, TypeError, hc.HousecallError):
        return True
    return False


@pytest.mark.parametrize("name", CALLS)
@FIXED
@given(ROWS, COLUMNS, st.sampled_from([torch.float32, torch.int64]), DTYPES, st.booleans())
def test_out_is_what_torch_makes_it(
    name: str, rows: int, columns: int, given_: torch.dtype, wanted: torch.dtype, dense: bool
) -> None:
    """Where torch refuses a dtype, so do pointers; or they cast to it, where torch's meta tensors would."""
    clinic, call = hc.VirtualWorker(id="clinic"), CALLS[name]
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).mul(4).to(given_)
    try:
        shaped = call(x, None)
    except RuntimeError:  # some know no whole numbers
        shaped = call(x.float(), None)
    local = alike(shaped, wanted, dense)
    there = hc.send(x, clinic)
    out = hc.send(local, clinic)
    if refused(call, x, local):
        if not refused(call, there, out):
            assert torch.can_cast(shaped.dtype, wanted)
            torch.testing.assert_close(out.get(), shaped.to(wanted), rtol=1e-5, atol=1e-5)
    else:
        assert not refused(call, there, out)
        assert torch.equal(out.get(), local)


@pytest.mark.parametrize("name", SEVERAL)
def test_several_outs(name: str, clinic: hc.VirtualWorker) -> None:
    call, x = SEVERAL[name], torch.randn(3, 2)
    plain: Any = x.unbind() if name == "unbind_copy" else call(x, None)
    local = [torch.zeros_like(one) for one in plain]
    there: list[Any] = [one.send(clinic) for one in local]  # type: ignore[attr-defined]  # the hook's
    expected, found = call(x, tuple(local)), call(x.send(clinic), tuple(there))  # type: ignore[attr-defined]  # as above
    assert (found is None) == (expected is None)
    for one, pointer in zip(local, there, strict=True):
        assert torch.equal(pointer.copy().get(), one)
    if found is not None:
        assert all(one is pointer for one, pointer in zip(found, there, strict=True))


def test_an_out_that_is_an_argument(clinic: hc.VirtualWorker) -> None:
    x = torch.arange(3.0)
    there: Any = hc.send(x, clinic)
    view = there[1:]
    assert torch.mul(there, 2, out=there) is there
    assert torch.equal(view.get(), x[1:] * 2)  # who shares it sees it


def test_out_is_not_resized(clinic: hc.VirtualWorker) -> None:
    x = hc.send(torch.ones(3), clinic)
    out = x.new_zeros(0)
    with pytest.raises(hc.UsageError, match=r"div.out gives shape \(3,\), and 'out' has \(0,\): .* is not resized"):
        torch.div(x, 2, out=out)
    with pytest.raises(hc.UsageError, match=r"nonzero.out gives shape \(3, 1\), and 'out' has \(2, 1\)"):
        torch.nonzero(x, out=x.new_zeros(2, 1, dtype=torch.long))
    with pytest.raises(hc.UsageError, match="gives 3 results, and 'out' has room for 2"):
        torch.unbind_copy(x, out=[x.new_zeros(()), x.new_zeros(())])
    assert out.shape == (0,)


def test_out_and_its_result_are_at_one_place(schools: tuple[hc.VirtualWorker, hc.VirtualWorker]) -> None:
    west, grape = schools
    x: Any = hc.send(torch.ones(3), west)
    with pytest.raises(hc.PlaceError, match=r"div\.out was to write into a local tensor what is at a worker"):
        torch.div(x, 2, out=torch.zeros(3))
    with pytest.raises(hc.PlaceError, match=r"div\.out was given tensors at 'grapevine' and at 'westside'"):
        torch.div(x, 2, out=hc.send(torch.zeros(3), grape))
    out: Any = hc.send(torch.zeros(3), west)
    torch.manual_seed(0)
    assert torch.rand(3, out=out) is out  # made here, and copied there
    torch.manual_seed(0)
    assert torch.equal(out.get(), torch.rand(3))


def test_out_has_no_gradient_as_in_torch(clinic: hc.VirtualWorker) -> None:
    x: Any = hc.send(torch.ones(3), clinic).requires_grad_()
    for one, out in ((x, torch.zeros_like(x)), (x.detach(), torch.zeros_like(x).requires_grad_())):
        with pytest.raises(RuntimeError, match="don't support automatic differentiation"):
            torch.div(one, 2, out=out)
    kept = x.detach().clone()
    squared = (kept.requires_grad_() ** 2).sum()
    with torch.no_grad():
        torch.div(x, 2, out=kept)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # its version has moved on
        squared.backward()


def test_what_is_written_is_the_owners_too() -> None:
    """An `out` joins the label of what is written into it."""
    clinic = hc.VirtualWorker(id="clinic")
    clinic.add("heart", x=torch.arange(3.0), policy=Policy.open_to("me"))
    clinic.add("lungs", x=torch.arange(3.0), policy=Policy(use=hc.Use(interactive=("me",))))
    for name, leaves in (("heart", True), ("lungs", False)):
        out: Any = hc.send(torch.zeros(3), clinic)
        view = out[:1]
        torch.div(clinic.dataset(name).column("x"), 2, out=out)
        if leaves:
            assert out.copy().get().tolist() == [0, 0.5, 1]
            continue
        for stays in (out, view, out * 0):
            with pytest.raises(hc.PolicyError, match="'lungs'"):
                stays.get()


def test_recorded(clinic: hc.VirtualWorker) -> None:
    def halved(x: Any, out: Any) -> Any:
        return torch.div(x, 2, out=out)

    recorded = hc.record(halved, torch.ones(3), torch.zeros(3))
    assert [call.op for call in recorded.program.calls] == ["div.Tensor", "copy_.default"]
    out = hc.send(torch.zeros(3), clinic)
    assert recorded(hc.send(torch.ones(3), clinic), out) is out
    assert out.get().tolist() == [0.5] * 3


@pytest.mark.parametrize(
    "normed", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm], ids=["parametrized", "hooked"]
)
def test_spectral_norm_trains(normed: Any, clinic: hc.VirtualWorker) -> None:
    """It writes its vectors with `out=`, in each forward."""

    def trained(place: hc.VirtualWorker | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(normed(nn.Conv2d(1, 2, 3)), nn.Flatten(), normed(nn.Linear(18, 3)))
        batches = torch.randn(4, 2, 1, 5, 5)
        if place is not None:
            model.send(place)  # type: ignore[operator]  # the hook's
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for x in batches:
            optimizer.zero_grad()
            model(x if place is None else hc.send(x, place)).square().mean().backward()
            optimizer.step()
        if place is not None:
            model.get()  # type: ignore[operator]  # as above
        return model.state_dict()

    expected, found = trained(None), trained(clinic)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_what_is_written_in_other_words() -> None:
    """All that torch can write into `out`, as far as the table has what gives it as a result."""
    assert rewritten(torch.ops.aten.div.Tensor) is None
    assert rewritten(torch.ops.aten.from_file.out) is None  # its plain form is refused as well
    left = []
    for full in torch._C._dispatch_get_all_op_names():
        name, _, which = full.removeprefix("aten::").partition(".")
        if full.startswith("aten::") and which.endswith("out"):
            packet = getattr(torch.ops.aten, name)
            known = any(f"{name}.{one}" in table() for one in packet.overloads())
            if known and rewritten(getattr(packet, which)) is None:
                left.append(f"{name}.{which}")
    # No Python reaches `normal.out`; the others write to an argument, too.
    assert sorted(left) == [
        "_batch_norm_with_update.out", "_native_batch_norm_legit.out", "normal.out", "rrelu_with_noise.out",
    ]  # fmt: skip
