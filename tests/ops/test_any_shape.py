"""Values and gradients of the op at random shapes, in the interpreter; apart, because GPU runs may lack hypothesis."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alora_kernels import alora_linear
from tests.compare import assert_as_good_as_torch, problem, skip_unless_runnable


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(0, 40), k=st.integers(1, 40), n=st.integers(1, 40), r=st.integers(1, 20), e=st.integers(1, 6),
    routing=st.sampled_from(["task", "soft"]), backend=st.sampled_from(["torch", "triton"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(m, k, n, r, e, routing, backend, seed):
    skip_unless_runnable(backend, "cpu", torch.float32)
    torch.manual_seed(seed)
    p = problem((m,), k, n, r, e, routing=routing, dtype=torch.float32, bias=bool(seed % 2))
    assert_as_good_as_torch(p, alora_linear, torch.float32, backend=backend)
