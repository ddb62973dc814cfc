"""The federated methods as data: for each role of a parameter, where it lives and how it begins.

In:   a method's name.
Out:  a `ShareSpec`: which roles travel, which stay with the client, which nobody trains, and the floats that travel.
Who:  `adapters` builds and sorts parameters by it; client and server read nothing else about a method.

Every method is federated averaging over a subset of the keys, so this table is all that tells one from another.
A role is the name a matrix has in the paper: A and B of LoRA, d and b of VeRA, and for unequal ranks A, M, B1, B2 under
the merged B. `head` is every other trained parameter, such as a classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, NamedTuple

Lives = Literal["shared", "private", "frozen"]
Begins = Literal["kaiming", "zeros", "built"]
Seed = Literal["common", "client"]


@dataclass(frozen=True)
class Role:
    """What happens to the matrices of one role.

    Attributes:
        lives: "shared" (travels each round), "private" (never leaves the client) or "frozen" (nobody trains it).
        begins: "kaiming" (uniform, as in LoRA), "zeros", or "built" (as the adapter's library made it).
        seed: whether all clients draw the same values ("common") or each its own ("client").
        trained: whether the optimiser sees it; the merged B of unequal ranks is shared but not trained.
        restarts: back to zeros at the start of every round, because its content has moved into a shared array.
    """

    lives: Lives
    begins: Begins
    seed: Seed = "common"
    trained: bool = True
    restarts: bool = False


class LayerShape(NamedTuple):
    """in_features and out_features of one adapted layer."""

    k: int
    n: int


#: floats of one layer that travel: (layer, rank, shared dimension d_m) -> count
Floats = Callable[[LayerShape, int, int], int]


@dataclass(frozen=True)
class ShareSpec:
    """One federated method.

    Attributes:
        name: key in `METHODS`.
        adapter: what is put on the layers: PEFT's "lora" or "vera", our "alora" tuner, or "het" (unequal ranks).
        roles: role -> `Role`.
        up, down: floats per layer and round from and to one client, by the paper's formula.
        cost: their sum in words, for people.
        aggregation: what the server does, in one line.
        exact: whether the mean of the shared arrays is the mean of the clients' weight updates, given equal private
            parts.
        rslora: s = alpha / sqrt(r).
        source: the paper.
    """

    name: str
    adapter: Literal["lora", "vera", "alora", "het"]
    roles: Mapping[str, Role]
    up: Floats
    down: Floats
    cost: str
    aggregation: str
    exact: bool
    source: str
    rslora: bool = False

    def living(self, lives: Lives) -> tuple[str, ...]:
        """Roles that live there."""
        return tuple(name for name, role in self.roles.items() if role.lives == lives)

    def floats(self, layers: Iterable[LayerShape], r: int, d_m: int = 0) -> tuple[int, int]:
        """Floats (up, down) of the adapter per client and round.

        Formula: the sums over layers of `up` and `down`.

        Args:
            layers: shapes of the adapted layers.
            r: the client's rank.
            d_m: rank of the shared space, for unequal ranks.

        Returns:
            Counts of numbers, to be multiplied by 4 for bytes in float32.
        """
        layers = list(layers)
        return sum(self.up(layer, r, d_m) for layer in layers), sum(self.down(layer, r, d_m) for layer in layers)

    def with_head(self, lives: Lives) -> ShareSpec:
        """The same method with heads that are "private" (default) or "shared"."""
        return replace(self, roles=_roles(**{**self.roles, "head": Role(lives, "built")}))


def _roles(**roles: Role) -> Mapping[str, Role]:
    return MappingProxyType({"head": Role("private", "built"), **roles})


def _none(layer: LayerShape, r: int, d_m: int) -> int:
    return 0


def _a(layer: LayerShape, r: int, d_m: int) -> int:
    return r * layer.k


def _b(layer: LayerShape, r: int, d_m: int) -> int:
    return r * layer.n


def _ab(layer: LayerShape, r: int, d_m: int) -> int:
    return r * (layer.k + layer.n)


def _lambda_d(layer: LayerShape, r: int, d_m: int) -> int:
    return r


def _merged(layer: LayerShape, r: int, d_m: int) -> int:
    return layer.n * d_m


def _merged_or_factors(layer: LayerShape, r: int, d_m: int) -> int:
    return min(r * (layer.n + d_m), layer.n * d_m)


_SPECS = (
    ShareSpec(
        name="fedit",
        adapter="lora",
        roles=_roles(A=Role("shared", "kaiming"), B=Role("shared", "zeros")),
        up=_ab,
        down=_ab,
        cost="2 r (K + N)",
        aggregation="mean of A and mean of B (not the mean of B A)",
        exact=False,
        source="Zhang et al. 2024, FedIT",
    ),
    ShareSpec(
        name="ffa-lora",
        adapter="lora",
        roles=_roles(A=Role("frozen", "kaiming", trained=False), B=Role("shared", "zeros")),
        up=_b,
        down=_b,
        cost="2 r N",
        aggregation="mean of B under one frozen A",
        exact=True,
        source="Sun et al. 2024, FFA-LoRA",
    ),
    ShareSpec(
        name="fedsa-lora",
        adapter="lora",
        roles=_roles(A=Role("shared", "kaiming"), B=Role("private", "zeros")),
        up=_a,
        down=_a,
        cost="2 r K",
        aggregation="mean of A",
        exact=True,
        source="Guo et al. 2025, FedSA-LoRA",
    ),
    ShareSpec(
        name="fedsa-rslora",
        adapter="lora",
        roles=_roles(A=Role("shared", "kaiming"), B=Role("private", "zeros")),
        up=_a,
        down=_a,
        cost="2 r K",
        aggregation="mean of A",
        exact=True,
        source="Guo et al. 2025, FedSA-rsLoRA",
        rslora=True,
    ),
    ShareSpec(
        name="fedsa-vera",
        adapter="vera",
        roles=_roles(d=Role("shared", "built"), b=Role("private", "zeros")),
        up=_lambda_d,
        down=_lambda_d,
        cost="2 r",
        aggregation="mean of lambda_d",
        exact=True,
        source="Guo et al. 2025, FedSA-VeRA",
    ),
    ShareSpec(
        name="fed-alora",
        adapter="alora",
        roles=_roles(A=Role("private", "kaiming", seed="client"), B=Role("shared", "zeros")),
        up=_b,
        down=_b,
        cost="2 r N",
        aggregation="mean of B",
        exact=True,
        source="Ban & Ji 2025, Fed-ALoRA, equal ranks",
    ),
    ShareSpec(
        name="fed-alora-het",
        adapter="het",
        roles=_roles(
            A=Role("private", "kaiming", seed="client"),
            M=Role("private", "kaiming", seed="client"),
            B1=Role("private", "kaiming", seed="client"),
            B2=Role("private", "zeros", restarts=True),
            B=Role("shared", "zeros", trained=False),
        ),
        up=_merged_or_factors,
        down=_merged,
        cost="N d_m + min(r (N + d_m), N d_m)",
        aggregation="B += sum_i w_i B2_i B1_i, as the mean of B + B2_i B1_i",
        exact=True,
        source="Ban & Ji 2025, Fed-ALoRA, unequal ranks",
    ),
    ShareSpec(
        name="local",
        adapter="lora",
        roles=_roles(A=Role("private", "kaiming", seed="client"), B=Role("private", "zeros")),
        up=_none,
        down=_none,
        cost="0",
        aggregation="none: nothing travels",
        exact=True,
        source="each client alone",
    ),
)

#: all methods by name
METHODS: Mapping[str, ShareSpec] = MappingProxyType({spec.name: spec for spec in _SPECS})


def share_spec(name: str, *, head: Lives = "private") -> ShareSpec:
    """The method with that name.

    Args:
        name: a key of `METHODS`.
        head: "private" keeps classifier heads with their clients; "shared" averages them as well.

    Raises:
        ValueError: no such method; the message lists the known ones.
    """
    if name not in METHODS:
        raise ValueError(f"unknown federated method {name!r}; known are {', '.join(METHODS)}")
    if head not in ("private", "shared"):
        raise ValueError(f"head must be 'private' or 'shared', got {head!r}")
    return METHODS[name].with_head(head)
