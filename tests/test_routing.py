"""Row groups and the routing context."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alora_kernels.routing import Routing, current_routing, expand_ids, group_rows, route


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


def test_ids_per_row_per_token_and_per_beam():
    per_row = torch.tensor([2, 0])
    assert expand_ids(per_row, torch.Size([2, 3])).tolist() == [2, 2, 2, 0, 0, 0]
    assert expand_ids(torch.tensor([[1, 2], [0, 1]]), torch.Size([2, 2])).tolist() == [1, 2, 0, 1]
    assert expand_ids(per_row, torch.Size([6, 1])).tolist() == [2, 2, 2, 0, 0, 0]  # three beams each
    assert expand_ids(torch.tensor([[1, 2], [0, 1]]), torch.Size([4])).tolist() == [1, 2, 0, 1]  # a flattened MLP
    with pytest.raises(ValueError, match=r"\(3,\) fit neither the batch nor the tokens"):
        expand_ids(torch.zeros(3).long(), torch.Size([2, 5]))


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
