"""Pointer tensors: what the article does, as printed, and what its readers will try next."""

from __future__ import annotations

import gc
import re
import threading

import pytest
import torch

import housecall as hc

PRINTED = re.compile(r"\(Wrapper\)>\[PointerTensor \| me:\d{11} -> clinic:\d{11}\]")


def test_send_and_get_as_the_article_prints_them(clinic: hc.VirtualWorker) -> None:
    dna = torch.tensor([0, 1, 2, 1, 2])
    dna_ptr = dna.send(clinic)
    assert PRINTED.fullmatch(repr(dna_ptr))
    assert PRINTED.fullmatch(str(dna_ptr))
    assert repr(dna_ptr) == repr(dna_ptr)
    assert dna_ptr.location is clinic
    assert list(clinic._objects) == [dna_ptr.id_at_location]
    assert torch.equal(clinic._objects[dna_ptr.id_at_location], dna)
    assert f"clinic:{dna_ptr.id_at_location}]" in repr(dna_ptr)
    back = dna_ptr.get()
    assert type(back) is torch.Tensor
    assert torch.equal(back, dna)
    assert clinic._objects == {}


def test_arithmetic(clinic: hc.VirtualWorker) -> None:
    a = torch.tensor([3.14, 6.28]).send(clinic)
    b = torch.tensor([6.14, 3.28]).send(clinic)
    c = a + b
    assert PRINTED.fullmatch(repr(c))
    assert len(clinic._objects) == 3
    assert torch.equal(c.get(), torch.tensor([3.14, 6.28]) + torch.tensor([6.14, 3.28]))


def test_backward_brings_the_gradient_home(clinic: hc.VirtualWorker) -> None:
    train = torch.tensor([2.4, 6.2], requires_grad=True).send(clinic)
    label = torch.tensor([2, 6.0]).send(clinic)
    loss = (train - label).abs().sum()
    loss.backward()
    assert isinstance(train.grad, hc.PointerTensor)
    train = train.get()
    assert train.requires_grad
    assert torch.equal(train.detach(), torch.tensor([2.4, 6.2]))
    assert torch.equal(train.grad, torch.tensor([1.0, 1.0]))


def test_a_gradient_goes_along(clinic: hc.VirtualWorker) -> None:
    x = torch.ones(2, requires_grad=True)
    (x * 3).sum().backward()
    pointer = x.send(clinic)
    (pointer * 2).sum().backward()
    assert torch.equal(pointer.get().grad, torch.tensor([5.0, 5.0]))
    assert torch.equal(x.grad, torch.tensor([3.0, 3.0]))


def test_copy_keeps_and_move_takes(schools: tuple[hc.VirtualWorker, hc.VirtualWorker]) -> None:
    west, grape = schools
    x = torch.arange(3.0, requires_grad=True).send(west)
    twin = x.copy()
    assert twin.requires_grad
    assert len(west._objects) == 2
    moved = x.move(grape)
    assert moved.location is grape
    assert moved.requires_grad
    assert torch.equal(twin.get().detach(), moved.get().detach())
    with pytest.raises(hc.SpentPointerError, match=r"\.move\(grapevine\) took its value away from 'westside'"):
        _ = x + 1
    assert twin.detach is not None
    assert moved.get is not None


def test_a_pointer_is_spent_after_get(clinic: hc.VirtualWorker) -> None:
    x = torch.ones(2).send(clinic)
    y = x.copy()
    x.get()
    uses = x.get, lambda: x + 1, lambda: y + x, lambda: x.location, lambda: x.tolist(), lambda: x.detach()
    for use in uses:
        with pytest.raises(hc.SpentPointerError, match=r"\.get\(\) took its value away from 'clinic'.*\.copy\(\)\.get"):
            use()
    assert "spent" in repr(x)


def test_get_of_an_intermediate_value_does_not_break_backward(clinic: hc.VirtualWorker) -> None:
    w = torch.tensor([2.0], requires_grad=True).send(clinic)
    y = w.exp()
    z = y * 3
    assert torch.equal(y.get(), torch.tensor([2.0]).exp())
    z.backward()
    assert torch.equal(w.get().grad, torch.tensor([2.0]).exp() * 3)


def test_values_that_python_needs_cost_one_wait_each(clinic: hc.VirtualWorker) -> None:
    x = torch.tensor([0.0, 2.0, 0.0, 5.0]).send(clinic)
    waits = clinic.session.waits
    assert x.sum().item() == 7.0
    assert bool((x > 4).any())
    assert float(x.max()) == 5.0
    assert int(x.argmax()) == 3
    assert clinic.session.waits == waits + 4
    assert x.nonzero().shape == (2, 1)
    assert x[x > 0].tolist() == [2.0, 5.0]
    assert torch.masked_select(x, x > 4).shape == (1,)
    assert torch.equal(x.unique().get(), torch.tensor([0.0, 2.0, 5.0]))
    assert [float(v) for v in x] == [0.0, 2.0, 0.0, 5.0]
    assert f"{x[1]:.2f}" == "2.00"
    assert 5.0 in x
    assert x.equal(x + 0)


def test_nothing_else_waits(clinic: hc.VirtualWorker) -> None:
    waits = clinic.session.waits
    x = torch.randn(8, 3).send(clinic)
    w = torch.randn(3, 2, requires_grad=True).send(clinic)
    for _ in range(5):
        loss = (x @ w).relu().square().mean()
        loss.backward()
        with torch.no_grad():
            w -= 0.1 * w.grad
            w.grad.zero_()
    assert clinic.session.waits == waits
    loss.get()
    assert clinic.session.waits == waits + 1


def test_sends_copy(clinic: hc.VirtualWorker) -> None:
    x = torch.zeros(4)
    pointer = x.send(clinic)
    pointer += 1
    x[0] = 9.0
    assert torch.equal(pointer.get(), torch.ones(4))
    assert torch.equal(x, torch.tensor([9.0, 0.0, 0.0, 0.0]))


def test_a_fetched_copy_is_the_callers_own(clinic: hc.VirtualWorker) -> None:
    pointer = torch.zeros(4).send(clinic)
    first = pointer.copy().get()
    first += 1
    assert torch.equal(pointer.get(), torch.zeros(4))


@pytest.mark.parametrize(
    "view", [lambda x: x[:1], lambda x: x[:, 3], lambda x: x[::7, ::3], lambda x: x[5].expand(4, 10)]
)
def test_a_view_sends_its_own_elements(view, clinic: hc.VirtualWorker) -> None:
    x = torch.randn(1000, 10)
    part = view(x)
    pointer = part.send(clinic)
    held = clinic._objects[pointer.id_at_location]
    assert held.untyped_storage().nbytes() <= part.numel() * 4
    assert held.stride() == pointer.stride()
    assert torch.equal(pointer.get(), part)


def test_layout_and_bits_travel(clinic: hc.VirtualWorker) -> None:
    columns = torch.randn(3, 4).t()
    assert columns.send(clinic).stride() == (1, 4)
    images = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    pointer = (images.send(clinic) * 2).get()
    assert pointer.is_contiguous(memory_format=torch.channels_last)
    z = torch.randn(3, dtype=torch.complex64)
    assert z.conj().send(clinic).is_conj()
    assert z.conj().imag.send(clinic).is_neg()
    for value in (z.conj(), z.conj().imag, z.imag, z.conj().conj()):
        there = value.send(clinic)
        assert torch.equal((there * 2).get(), value * 2)
        assert torch.equal(there.get(), value)


def test_a_complex_result_is_right_where_the_frame_runs_inside_torch(clinic: hc.VirtualWorker) -> None:
    # Typing `lstsq` asks the worker from inside torch's dispatch, where torch has switched the conjugate key off.
    torch.manual_seed(0)
    a, b = torch.randn(5, 3, dtype=torch.complex64), torch.randn(5, 3, dtype=torch.complex64)
    found = torch.linalg.lstsq(a.send(clinic), b.send(clinic), driver="gels").residuals.get()
    torch.testing.assert_close(found, torch.linalg.lstsq(a, b, driver="gels").residuals)


def test_mixing_places_names_both_and_says_what_to_do(schools: tuple[hc.VirtualWorker, hc.VirtualWorker]) -> None:
    west, grape = schools
    here, there, mine = torch.ones(3).send(west), torch.ones(3).send(grape), torch.ones(3)
    with pytest.raises(hc.PlaceError, match=r"at 'westside' and at 'grapevine'.*x\.move\(grapevine\)"):
        _ = here + there
    locals_of_all_kinds = [
        lambda: here + mine,
        lambda: mine + here,
        lambda: here + torch.ones(3),
        lambda: here + mine * 2,
        lambda: here.add_(mine),
        lambda: mine.add_(here),
        lambda: torch.stack([here, mine]),
        lambda: torch.add(here, other=torch.ones(3)),
        lambda: torch.nn.functional.linear(here, torch.ones(2, 3)),
        lambda: torch.nn.functional.linear(here, mine.view(1, 3)),
        lambda: torch.where(mine > 0, here, here),
        lambda: here.index_select(0, torch.tensor([0])),
    ]
    for mix in locals_of_all_kinds:
        with pytest.raises(hc.PlaceError, match=r"'westside' and a local one of shape .*\.send\(westside\).*\.get\(\)"):
            mix()
    with pytest.raises(hc.PlaceError, match=r"bring it home first, with \.get\(\)"):
        mine.copy_(here)
    assert torch.equal(here.get(), mine)


def test_local_scalars_and_positions_go_along(clinic: hc.VirtualWorker) -> None:
    x = torch.arange(4.0).send(clinic)
    assert torch.equal((x * torch.tensor(2.0)).get(), torch.arange(4.0) * 2)
    assert torch.equal((torch.tensor(2, dtype=torch.int64) + x).get(), torch.arange(4.0) + 2)
    assert torch.equal(x[[0, 2]].get(), torch.tensor([0.0, 2.0]))
    assert torch.equal(x[torch.tensor([3, 1])].get(), torch.tensor([3.0, 1.0]))
    x[[0, 1]] = torch.tensor(7.0)
    assert torch.equal(x.get(), torch.tensor([7.0, 7.0, 2.0, 3.0]))


def test_constants_that_torch_makes_go_along(clinic: hc.VirtualWorker) -> None:
    x = torch.arange(5.0).send(clinic)
    assert x.quantile(0.5).item() == 2.0
    q = torch.randn(1, 3, 4)
    attention = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(
        attention(*[q.send(clinic)] * 3, is_causal=True).get(), attention(q, q, q, is_causal=True)
    )


def test_in_place_and_views(clinic: hc.VirtualWorker) -> None:
    x, p = torch.arange(12.0).view(3, 4), torch.arange(12.0).view(3, 4).send(clinic)
    for t in (x, p):
        t[1] = 0
        t[:, 0] += 5
        t.view(-1)[2] = -1
        row = t[2]
        row.mul_(2)
        t.t_()
        t.unsqueeze_(0)
        t.squeeze_()
        t.clamp_(max=20)
    assert p.shape == x.shape
    assert p.stride() == x.stride()
    assert torch.equal(p.get(), x)


def test_in_place_under_autograd(clinic: hc.VirtualWorker) -> None:
    def gradient(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y[0] = y[1] * 3
        y[:, 1].mul_(4)
        y.t_()
        y.square().sum().backward()
        return x.grad

    x = torch.arange(6.0).view(2, 3).requires_grad_()
    expected = gradient(x)
    found = gradient(x.detach().clone().requires_grad_().send(clinic))
    assert torch.equal(found.get(), expected)


def test_data_and_detach_share_the_value(clinic: hc.VirtualWorker) -> None:
    x = torch.zeros(2, requires_grad=True).send(clinic)
    x.data.add_(1)
    x.detach().add_(1)
    assert len(clinic._objects) == 1
    x.data = torch.full((2,), 5.0).send(clinic)
    assert torch.equal(x.get().detach(), torch.tensor([5.0, 5.0]))


def test_to_and_devices(clinic: hc.VirtualWorker) -> None:
    x = torch.ones(2).send(clinic)
    assert x.to("cpu") is x
    assert x.to(torch.device("cpu")) is x
    assert x.double().dtype is torch.float64
    assert x.to(torch.int64).get().tolist() == [1, 1]


def test_higher_derivatives(clinic: hc.VirtualWorker) -> None:
    x = torch.tensor(2.0, requires_grad=True).send(clinic)
    (first,) = torch.autograd.grad(x**3, x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    assert (first.item(), second.item()) == (12.0, 12.0)


def test_what_needs_memory_here_says_so(clinic: hc.VirtualWorker) -> None:
    x = torch.ones(2).send(clinic)
    with pytest.raises(hc.UsageError, match=r"numpy cannot read a tensor at 'clinic': call \.get\(\)"):
        x.numpy()
    with pytest.raises(hc.UsageError, match=r"no memory here: call \.get\(\) first"):
        x.share_memory_()
    with pytest.raises(hc.UsageError, match="cannot be saved or pickled"):
        torch.save(x, "/dev/null")
    with pytest.raises(hc.UnknownOperator, match="resize_"):
        x.resize_(9)
    with pytest.raises(hc.UsageError, match=r"torch\.Generator, which cannot go to a worker; call torch\.manual_seed"):
        x.uniform_(generator=torch.Generator())
    assert torch.equal(torch.empty_like(x).get(), torch.zeros(2))  # never memory that others left behind


def test_bad_sends_are_refused_and_lose_nothing(schools: tuple[hc.VirtualWorker, hc.VirtualWorker]) -> None:
    west, grape = schools
    x = torch.ones(2)
    with pytest.raises(hc.UsageError, match="expected a worker, such as VirtualWorker"):
        x.send("clinic")
    with pytest.raises(hc.UsageError, match=r"this tensor is here already"):
        x.get()
    with pytest.raises(hc.UsageError, match="send its inputs, or detach it"):
        (x.requires_grad_() * 2).send(west)
    with pytest.raises(hc.UsageError, match=r"layout torch\.sparse_coo cannot be sent: call \.to_dense\(\)"):
        torch.eye(2).to_sparse().send(west)
    pointer = torch.ones(2).send(west)
    with pytest.raises(hc.UsageError, match=r"lives at 'westside' .*\.move\(grapevine\)"):
        pointer.send(grape)
    with pytest.raises(hc.UsageError, match="it is there already"):
        pointer.send(west)
    with pytest.raises(hc.UsageError, match="expected a worker"):
        pointer.move("grapevine")
    assert torch.equal(pointer.get(), torch.ones(2))


def test_random_numbers_follow_the_callers_seed(schools: tuple[hc.VirtualWorker, hc.VirtualWorker]) -> None:
    west, grape = schools
    x, y = torch.ones(50).send(west), torch.ones(50).send(grape)
    torch.manual_seed(3)
    expected = [torch.rand(50), torch.rand(50)]
    torch.manual_seed(3)
    found = [torch.rand_like(x).get(), torch.rand_like(x).get()]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    other = torch.rand_like(y).get()
    assert not set(other.tolist()) & set(torch.cat(expected).tolist())  # a stream of its own, not the same shifted
    torch.manual_seed(3)
    assert torch.equal(torch.rand_like(x).get(), expected[0])
    torch.manual_seed(3)
    assert torch.equal(torch.rand_like(y).get(), expected[0])


def test_a_workers_draws_leave_the_process_generator_alone(clinic: hc.VirtualWorker) -> None:
    x = torch.ones(1000).send(clinic)
    torch.manual_seed(5)
    x.bernoulli(0.5)
    after_issue = torch.default_generator.get_state()
    clinic.session.wait()
    assert torch.equal(torch.default_generator.get_state(), after_issue)


def test_slots_die_with_their_pointers(clinic: hc.VirtualWorker) -> None:
    def work() -> None:
        x = torch.randn(10, 3).send(clinic)
        w = torch.randn(3, 3, requires_grad=True).send(clinic)
        for _ in range(20):
            (x @ w).tanh().sum().backward()
        parts = x.split(2)
        cycle: list[object] = [parts]
        cycle.append(cycle)

    work()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    gc.collect()
    assert clinic._objects == {}


def test_ids_do_not_follow_a_seed() -> None:
    seen = set()
    for _ in range(3):
        torch.manual_seed(0)
        worker = hc.VirtualWorker(id="w")
        seen |= {torch.ones(1).send(worker).id_at_location for _ in range(100)}
    assert len(seen) == 300


def test_tags_descriptions_and_search(clinic: hc.VirtualWorker) -> None:
    x = torch.arange(3.0).send(clinic).tag("#dna", "#harmony").describe("a gene sequence")
    y = torch.ones(2).send(clinic).tag("#dna")
    assert [p.id_at_location for p in clinic.search("#dna")] == [x.id_at_location, y.id_at_location]
    (found,) = clinic.search("#dna", "#harmony")
    assert found.shape == (3,)
    assert torch.equal((found + 1).get(), torch.arange(3.0) + 1)
    del found
    assert clinic.search("#heart") == []
    with pytest.raises(hc.UsageError, match="a tag begins with '#'"):
        x.tag("dna")
    del x
    assert [p.id_at_location for p in clinic.search("#dna")] == [y.id_at_location]
    clinic.clear()
    assert clinic._objects == {}
    with pytest.raises(hc.OperatorError, match="no slot"):
        y.get()


def test_repr_in_a_notebook(clinic: hc.VirtualWorker) -> None:
    page = torch.ones(2, 3, requires_grad=True).send(clinic)._repr_html_()
    assert "2 × 3" in page
    assert "torch.float32" in page
    assert "requires grad" in page
    assert repr(clinic) == "<VirtualWorker id:clinic #objects:0>"


def test_the_hook_adds_and_can_be_undone(hook: hc.TorchHook) -> None:
    before = torch.Tensor.add
    with pytest.raises(hc.UsageError, match=r"TorchHook\(torch\)"):
        hc.TorchHook("torch")
    second = hc.TorchHook(torch)
    second.remove()
    second.remove()
    assert hasattr(torch.Tensor, "send")  # the session's own hook still holds
    assert torch.Tensor.add is before
