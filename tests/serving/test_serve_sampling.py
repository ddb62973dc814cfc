"""Tokens are chosen row by row: exactness of the cuts, distributions, seeds, independence of neighbours."""

from __future__ import annotations

import math
import random

import pytest
import torch

from alora_kernels.serving.request import RequestError, Sampling
from alora_kernels.serving.sampling import NotFiniteError, Row, choose


def row(seed: int = 0, **settings) -> Row:
    return Row(Sampling(**settings), random.Random(seed).random)


def test_temperature_zero_is_argmax_and_draws_nothing():
    logits = torch.randn(3, 50)
    never = Row(Sampling(temperature=0), lambda: pytest.fail("greedy rows draw no random number"))
    assert torch.equal(choose(logits, [never] * 3), logits.argmax(-1))


def expected(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """The distribution, written down step by step."""
    p = (logits.double() / temperature).softmax(-1)
    order = p.argsort(descending=True)
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    kept, total = torch.zeros_like(p), 0.0
    for token in order:
        kept[token] = p[token]
        total += float(p[token])
        if total >= top_p:
            break
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.6), (0.8, 7, 0.7)]
)
def test_frequencies_follow_the_distribution(temperature, top_k, top_p):
    torch.manual_seed(1)
    logits, draws = torch.randn(20) * 2, 20000
    wanted = expected(logits, temperature, top_k, top_p)
    # evenly spaced numbers in place of random ones: the counts are then exact to one draw per token
    numbers = iter((i + 0.5) / draws for i in range(draws))
    settings = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    tokens = choose(logits.expand(draws, -1).contiguous(), [Row(settings, lambda: next(numbers))] * draws)
    counts = torch.bincount(tokens, minlength=20) / draws
    assert torch.all((counts - wanted).abs() <= 1.5 / draws)
    assert torch.all(counts[wanted == 0] == 0)


def test_a_seed_gives_the_same_tokens_in_any_company():
    logits = torch.randn(6, 200)
    alone = [choose(logits[i : i + 1], [row(seed=i, temperature=0.9, top_p=0.8 if i % 2 else 1.0)]) for i in range(6)]
    rows = [row(seed=i, temperature=0.9, top_p=0.8 if i % 2 else 1.0) for i in range(6)]
    together = choose(logits, rows)
    assert torch.equal(together, torch.cat(alone))
    mixed = choose(
        logits, [row(seed=0, temperature=0.9), *[row(temperature=0)] * 4, row(seed=5, temperature=0.9, top_p=0.8)]
    )
    assert mixed[0] == alone[0] and mixed[5] == alone[5]


def test_the_extremes_of_the_random_number_pick_tokens_that_have_probability():
    logits = torch.full((1, 10), -torch.inf)
    logits[0, [3, 6]] = 0.0
    for u, token in ((0.0, 3), (0.499999, 3), (0.5, 6), (math.nextafter(1.0, 0.0), 6)):
        for top_k in (0, 4):
            tokens = choose(logits, [Row(Sampling(top_k=top_k), lambda u=u: u)])
            assert tokens.tolist() == [token]


def test_top_k_beyond_the_vocabulary_and_top_p_of_almost_nothing():
    logits = torch.randn(2, 8)
    tokens = choose(logits, [row(top_k=100), row(top_p=1e-9)])
    assert tokens[1] == logits[1].argmax()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_raise_before_any_number_is_drawn(bad):
    logits = torch.randn(3, 10)
    logits[1, 4] = bad
    with pytest.raises(NotFiniteError):
        choose(logits, [Row(Sampling(), lambda: pytest.fail("a number was drawn"))] * 3)
    logits[1, 4] = -math.inf  # a token that is ruled out is fine
    choose(logits, [row(), row(), row()])


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("max_tokens", 0), ("max_tokens", -3), ("max_tokens", 1.5), ("max_tokens", True),
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", 1e9),
        ("top_p", 0.0), ("top_p", 1.01), ("top_p", math.nan), ("top_k", -1), ("top_k", 2.0),
        ("seed", 1.5), ("seed", 2**64), ("stop", "text"), ("stop", ("",)), ("stop", ("a",) * 5), ("stop", (3,)),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(param, value):
    with pytest.raises(RequestError, match=param) as caught:
        Sampling(**{param: value})
    assert caught.value.param == param
