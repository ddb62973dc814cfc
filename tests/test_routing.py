"""Row groups and the routing context."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alora_kernels import FusedALoRALinear, routing
from alora_kernels.routing import Routing, current_routing, expand_ids, group_rows, route
from alora_kernels.training.tasks import batch_routing
from alora_kernels.tuner.router import BatchRouting


@given(st.lists(st.integers(-1, 4), max_size=60))
def test_groups_hold_every_row_once_and_keep_their_order(ids):
    groups = group_rows(torch.tensor(ids, dtype=torch.long), 5)
    order, offsets = groups.order.tolist(), groups.offsets.tolist()
    assert sorted(order) == list(range(len(ids)))
    for task in range(5):
        rows = order[offsets[task] : offsets[task + 1]]
        assert rows == [i for i, t in enumerate(ids) if t == task]
    assert order[: offsets[0]] == [i for i, t in enumerate(ids) if t == -1]
    assert offsets[-1] == len(ids)


def expanded(ids, leading, *how):
    ids = expand_ids(torch.tensor(ids), torch.Size(leading), *how)
    return None if ids is None else ids.tolist()


def test_ids_per_row():
    assert expanded([2, 0], [2, 3]) == [2, 2, 2, 0, 0, 0]
    assert expanded([2, 0], [2]) == [2, 0]
    assert expanded([2, 0], [2, 2, 2]) == [2] * 4 + [0] * 4


def test_ids_per_token():
    assert expanded([[1, 2], [0, 1]], [2, 2]) == [1, 2, 0, 1]
    assert expanded([[1, 2], [0, 1]], [4]) == [1, 2, 0, 1]  # a flattened MLP
    assert expanded([[1, 2, 0]], [3]) == [1, 2, 0]
    assert expanded([1, 2, 0], [1, 3]) == [1, 2, 0]  # packed
    assert expanded([[1, 2], [0, 1]], [2]) is None  # a pooler sees no tokens


def test_only_declared_beams_are_rows_of_an_id():
    assert expanded([2, 0], [6, 1]) is None
    assert expanded([2, 0], [6, 1], 3) == [2, 2, 2, 0, 0, 0]
    assert expanded([2, 0], [4, 1], 3) is None
    assert expanded([2, 0], [2, 2], 3) == [2, 2, 0, 0]  # the encoder runs before rows are repeated
    with pytest.raises(ValueError, match="at least 1"):
        Routing(torch.tensor([0]), repeats=0)


@pytest.mark.parametrize("leading", [[3, 2], [6], [1, 6], [5, 4], [12, 2], []])
def test_a_first_dimension_that_is_not_the_batch_is_refused(leading):
    assert expanded([1, 0, 1, 0], leading) is None


def test_known_layouts():
    assert expanded([2, 0], [3, 2], 1, "time") == [2, 0, 2, 0, 2, 0]
    assert expanded([2, 0], [2, 2], 1, "time") == [2, 0, 2, 0]  # as many steps as rows
    assert expanded([2, 0], [2, 2], 1, "batch") == [2, 2, 0, 0]
    assert expanded([2, 0], [1, 4, 2], 2, "time") == [2] * 4 + [0] * 4
    assert expanded([2, 0], [2, 3], 1, "time") is None
    assert expanded([2, 0], [6], 1, "steps") == [2, 0, 2, 0, 2, 0]
    assert expanded([2, 0], [6], 2, "steps") is None
    assert expanded([2, 0], [6], 1, "blocks") == [2, 2, 2, 0, 0, 0]
    assert expanded([2, 0], [4, 3], 1, "blocks") == [2] * 6 + [0] * 6
    assert expanded([2, 0], [3, 2], 1, "blocks") is None
    assert expanded([[2, 0, 1], [1, 1, 2]], [3, 2], 1, "time") == [2, 1, 0, 1, 1, 2]
    assert expanded([[2, 1], [0, 1], [1, 2]], [3, 2], 1, "time") == [2, 1, 0, 1, 1, 2]  # as the layer has them
    assert expanded([[2, 0], [1, 1]], [2, 2], 1, "time") is None
    assert expanded([[2, 0, 1], [1, 1, 2]], [6], 1, "steps") == [2, 1, 0, 1, 1, 2]
    assert expanded([[2, 0, 1], [1, 1, 2]], [6], 1, "blocks") == [2, 0, 1, 1, 1, 2]


def test_what_does_not_fit_names_the_layer_and_the_remedy():
    layer = FusedALoRALinear(4, 3, r=2, tasks=2)
    with route([0, 1]), pytest.raises(ValueError, match=r"FusedALoRALinear\(in_features=4.*route\(ids, repeats=n\)"):
        layer(torch.zeros(4, 4))
    with route([0, 1], repeats=2):
        assert layer(torch.zeros(4, 4)).shape == (4, 3)
    with pytest.raises(ValueError, match=r"FusedALoRALinear.*leading shape \(5, 2\)"):
        layer(torch.zeros(5, 2, 4), Routing(torch.tensor([0, 1])))


def test_a_single_task_for_all_rows_fits_any_shape():
    layer = FusedALoRALinear(4, 3, r=2, tasks=1)
    with route([0, 0]):
        assert layer(torch.zeros(5, 4)).shape == (5, 3)
    with route([0, -1]), pytest.raises(ValueError, match="fit neither"):
        layer(torch.zeros(5, 4))


def test_groups_are_built_once_per_batch():
    routing = Routing(torch.tensor([0, 1]))
    first = routing.groups(torch.Size([2, 4]), 2, torch.device("cpu"))
    assert routing.groups(torch.Size([2, 4]), 2, torch.device("cpu")) is first
    with pytest.raises(ValueError, match=r"valid ids are -1 \(base only\) and 0 \.\. 0"):
        routing.groups(torch.Size([2, 4]), 1, torch.device("cpu"))


def test_route_nests_and_survives_errors():
    assert current_routing() is None
    with route([0]) as outer:
        assert current_routing() is outer
        with pytest.raises(RuntimeError, match="inside"), route(torch.tensor([1])):
            assert current_routing() is not outer
            raise RuntimeError("inside")
        assert current_routing() is outer
    assert current_routing() is None


def test_route_refuses_what_is_no_tensor():
    with pytest.raises(TypeError, match="integer tensor"):
        Routing("math")  # type: ignore[arg-type]


def test_route_takes_ids_and_says_where_names_go():
    with (
        pytest.raises(TypeError, match=r"route takes ids, got \['math', 0\].*adapter_names=\[\.\.\.\] to a PEFT model"),
        route(["math", 0]),
    ):  # type: ignore[list-item]
        pass


def test_a_captured_graph_makes_its_own_groups(monkeypatch):
    """A replay reads the ids that are in their buffer then: groups made before the capture would be those of before."""
    ids = torch.tensor([0, 1, 1], dtype=torch.int32)
    batch = Routing(ids)
    before = batch.groups(torch.Size([3]), 2, ids.device)
    monkeypatch.setattr(routing, "capturing", lambda device: True)
    inside = batch.groups(torch.Size([3]), 2, ids.device)
    assert inside is not before and batch.at(None).groups(torch.Size([3]), 2, ids.device) is inside
    monkeypatch.setattr(routing, "capturing", lambda device: False)
    assert batch.groups(torch.Size([3]), 2, ids.device) is before


def test_a_copy_in_a_graph_keeps_all_but_what_calls_left(monkeypatch):
    """Attributes are named in `kept`, since torch 2.11 cannot trace a `__dict__`: a forgotten one would be lost."""
    ids, tables = torch.tensor([0, 1, -1]), {"default": ("math", "code"), "other": ("code", "math")}
    made = [
        Routing(ids),
        routing.ConstantRouting(1),
        routing.PickedRouting(Routing(ids), torch.Size([3]), torch.tensor([2, 0])),
        BatchRouting(["math", "code", "__base__"], tables),
        batch_routing(ids, ("math", "code"), tables),
    ]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for one in made:
        copied = one.at("layer", "batch")
        assert type(copied) is type(one) and copied.layer == "layer" and copied.layout == "batch"
        for name in one.__dict__.keys() - {"_groups", "_checked"}:
            assert copied.__dict__[name] is one.__dict__[name], (type(one), name)
