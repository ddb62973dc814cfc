"""Row layouts of the torch backend: every row with a task meets its own A once, whatever the layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from alora_kernels import alora_linear
from alora_kernels.ops.torch_rows import Slots, Whole, layout_of
from alora_kernels.routing import Routing, group_rows
from tests.compare import assert_as_good_as_torch, problem

E = 5
BATCHES = {
    "whole": (torch.full((40,), 3), Whole),
    "runs": (torch.tensor([2, -1, 4, 2]).repeat_interleave(20), list),
    "short runs": (torch.arange(6).remainder(3).repeat_interleave(24), list),
    "equal slots": (torch.tensor([4, 0, 2, 3, 1]), Slots),
    "ragged slots": (torch.tensor([4, 0, 4, 3, -1, 1, 4, -1, 0]), Slots),
    "slots of some": (torch.tensor([4, 2, -1, 2]), Slots),
    "gathered": (torch.tensor([1, 0] + [1] * 40 + [0, 2, 3, -1]).flip(0), list),
    "one of some rows": (torch.tensor([1, -1, 1, -1]), list),
    "all base": (torch.full((6,), -1), list),
    "none": (torch.zeros(0, dtype=torch.long), list),
}


@pytest.mark.parametrize("name", BATCHES)
def test_each_batch_gets_the_layout_meant_for_it(name):
    ids, kind = BATCHES[name]
    layout = layout_of(group_rows(ids, E))
    assert isinstance(layout, kind)
    if name in ("runs", "gathered"):
        picked = {type(rows) for _, rows in layout}
        assert picked == {slice if name == "runs" else torch.Tensor}
    if isinstance(layout, Slots):
        assert (layout.taken is None) == (name != "ragged slots" and name != "slots of some")
        assert (layout.tasks is None) == (name == "equal slots")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_runs_of_16_bit_rows_go_through_one_product(dtype):
    """Each small product is slow there; what is known of a batch in another dtype does not count."""
    groups = group_rows(torch.arange(12).remainder(4).repeat_interleave(32), 4)
    assert isinstance(layout_of(groups), list)
    assert isinstance(layout_of(groups, dtype=dtype), Slots)
    assert isinstance(layout_of(groups, dtype=torch.float64), list)
    assert isinstance(layout_of(group_rows(torch.arange(12).remainder(4).repeat_interleave(64), 4), dtype=dtype), list)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_values_and_gradients(name, dtype, dropout):
    ids, _ = BATCHES[name]
    p = problem((len(ids),), 24, 18, 4, E, routing="task", dtype=dtype, ids=ids)
    if dropout == 0.0:
        assert_as_good_as_torch(p, alora_linear, dtype, backend="torch")
        return
    torch.manual_seed(3)
    ours = p.step(alora_linear, dropout_p=dropout, training=True)
    torch.manual_seed(3)
    again = p.step(alora_linear, dropout_p=dropout, training=True)
    assert all(torch.equal(ours[key], again[key]) for key in ours)
    absent = [task for task in range(E) if task not in ids.tolist()]
    assert (ours["da"][absent] == 0).all()


@given(st.lists(st.integers(-1, 4), max_size=80), st.booleans())
def test_every_row_with_a_task_is_picked_once(ids, ordered):
    tensor = torch.tensor(sorted(ids) if ordered else ids, dtype=torch.long)
    layout = layout_of(group_rows(tensor, E))
    numbers = torch.arange(len(ids)).unsqueeze(1)
    found = torch.full((len(ids),), -1)
    if isinstance(layout, Whole):
        found[:] = layout.task
    elif isinstance(layout, Slots):
        tasks = torch.arange(E) if layout.tasks is None else layout.tasks
        lines = layout.lay(numbers)
        assert torch.equal(layout.collect(lines).squeeze(1), layout.rows)
        assert layout.lines == len(tasks) == len(lines)
        for task, line in zip(tasks.tolist(), lines.squeeze(2).tolist(), strict=True):
            assert {int(tensor[row]) for row in line} == {task}  # free slots repeat a row of the same task
            found[line] = task
        once = layout.lay_once(torch.ones(len(ids), 1))
        assert once.sum() == len(layout.rows) == len(set(layout.rows.tolist()))
    else:
        for task, rows in layout:
            assert (found[rows] == -1).all()
            found[rows] = task
    assert torch.equal(found, tensor)


@pytest.mark.parametrize("name", [name for name, (ids, _) in BATCHES.items() if len(ids)])
def test_what_is_not_a_number_stays_in_its_task(name):
    ids, _ = BATCHES[name]
    p = problem((len(ids),), 24, 18, 4, E, routing="task", dtype=torch.float32, ids=ids)
    clean = p.step(alora_linear)
    for task in range(E):
        p.leaves["a"].data[task] = float("nan")
        dirty = p.step(alora_linear)
        p.leaves["a"].data[task] = 0.0
        own = ids == task
        assert dirty["y"][own].isnan().all() and dirty["dx"][own].isnan().all()
        others = torch.arange(E) != task
        p.leaves["a"].data[task] = torch.randn(4, 24)
        for key in ("y", "dx"):
            assert not dirty[key][~own].isnan().any(), key
        assert not dirty["da"][others].isnan().any()
    assert not any(t.isnan().any() for t in clean.values())


@pytest.mark.parametrize("name", [name for name, (ids, _) in BATCHES.items() if len(ids)])
def test_a_bad_row_spoils_no_other_task(name):
    ids, _ = BATCHES[name]
    p = problem((len(ids),), 24, 18, 4, E, routing="task", dtype=torch.float32, ids=ids)
    p.leaves["x"].data[0] = float("inf")
    found = p.step(alora_linear)
    assert not found["y"][1:].isnan().any()
    assert not found["da"][torch.arange(E) != ids[0]].isnan().any()


@pytest.mark.parametrize("name", ["runs", "ragged slots", "slots of some", "gathered", "one of some rows", "all base"])
def test_base_only_rows_are_the_base_bit_for_bit(name):
    ids, _ = BATCHES[name]
    p = problem((len(ids),), 24, 18, 4, E, routing="task", dtype=torch.float32, ids=ids)
    with torch.no_grad():
        x, bias = p.leaves["x"], p.leaves["bias"]
        y = alora_linear(x, p.weight, p.leaves["a"], p.leaves["b"], bias=bias, task_ids=ids)
        base = F.linear(x, p.weight, bias)
    assert torch.equal(y[ids < 0], base[ids < 0])
    assert (ids < 0).any()


def test_the_layout_is_worked_out_once_per_batch():
    groups = Routing(torch.tensor([1, 0, 2])).groups(torch.Size([3]), E, torch.device("cpu"))
    assert layout_of(groups) is layout_of(groups)
    before = layout_of(groups)
    groups.order.copy_(torch.tensor([0, 1, 2]))
    assert layout_of(groups) is not before  # the tensors changed
    with torch.inference_mode():
        inside = group_rows(torch.tensor([1, 0, 2]), E)
        assert layout_of(inside) is layout_of(inside)


def test_an_id_that_names_no_task_gets_the_base():
    """Ids are not checked while a graph is traced: such a row must not fail, nor meet another task's A."""
    for ids in (torch.tensor([0, 9, 1, 9]), torch.tensor([0, 9, 1]).repeat_interleave(20)):
        groups = group_rows(ids, E)
        layout = layout_of(groups)
        if isinstance(layout, Slots):
            assert set(ids[layout.rows].tolist()) == {0, 1}
        else:
            assert [task for task, _ in layout] == [0, 1]
