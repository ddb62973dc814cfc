"""The federated methods as data: for each role of a parameter, where it lives and how it begins.

Every method is federated averaging over a subset of the keys, so this table is all that tells one from another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, NamedTuple

Lives = Literal["shared", "private", "frozen"]


@dataclass(frozen=True)
class Role:
    """What happens to the matrices of one role.

    "kaiming" is uniform, as in LoRA; private ones each client draws on its own, all others are the same for all.
    "built" is as the adapter's library made it.
    """

    lives: Lives  # "shared": travels each round; "private": never leaves the client; "frozen": nobody trains it
    begins: Literal["kaiming", "zeros", "built"]
    restarts: bool = False  # at zeros in every round, because its content has moved into a shared array


class LayerShape(NamedTuple):
    """in_features and out_features of one adapted layer."""

    k: int
    n: int


@dataclass(frozen=True)
class ShareSpec:
    """One federated method.

    A role is the name a matrix has in the paper: A and B of LoRA, d and b of VeRA, and for unequal ranks A, M, B1, B2
    under the merged B; `head` is every other trained parameter.
    """

    name: str  # key in `METHODS`
    adapter: Literal["lora", "vera", "alora", "het"]  # PEFT's, our tuner, or that of unequal ranks
    roles: Mapping[str, Role]
    cost: str  # floats per layer and round, up and down together, in words
    aggregation: str  # what the server does, in one line
    source: str  # the paper
    exact: bool = True  # whether the shared arrays' mean is that of weight updates, given equal private parts
    rslora: bool = False  # s = alpha / sqrt(r)

    def living(self, lives: Lives) -> tuple[str, ...]:
        """Roles that live there."""
        return tuple(name for name, role in self.roles.items() if role.lives == lives)

    def floats(self, layers: Iterable[LayerShape], r: int, d_m: int = 0) -> tuple[int, int]:
        """Floats (up, down) of the adapter per client and round, r being the client's rank; heads are not counted.

        Formula: the sum over layers and shared roles of r K for A, r N for B and r for d, both ways; with unequal ranks
        N d_m down and min(r (N + d_m), N d_m) up, d_m being the rank of the shared space.
        """
        up = down = 0
        for k, n in layers:
            if self.adapter == "het":
                up += min(r * (n + d_m), n * d_m)
                down += n * d_m
            else:
                sizes = {"A": r * k, "B": r * n, "d": r, "head": 0}
                both = sum(sizes[role] for role in self.living("shared"))
                up, down = up + both, down + both
        return up, down


def _roles(**roles: Role) -> Mapping[str, Role]:
    return MappingProxyType({"head": Role("private", "built"), **roles})


_A, _B = Role("shared", "kaiming"), Role("shared", "zeros")
_OWN_A, _OWN_B = Role("private", "kaiming"), Role("private", "zeros")
_HET = {
    **dict.fromkeys(("A", "M", "B1"), _OWN_A),
    "B2": Role("private", "zeros", restarts=True),
    "B": _B,  # a buffer: merged, not trained
}
# fmt: off
_SPECS = (
    ShareSpec("fedit", "lora", _roles(A=_A, B=_B), "2 r (K + N)",
              "mean of A and mean of B (not the mean of B A)", "Zhang et al. 2024, FedIT", exact=False),
    ShareSpec("ffa-lora", "lora", _roles(A=Role("frozen", "kaiming"), B=_B), "2 r N",
              "mean of B under one frozen A", "Sun et al. 2024, FFA-LoRA"),
    ShareSpec("fedsa-lora", "lora", _roles(A=_A, B=_OWN_B), "2 r K",
              "mean of A", "Guo et al. 2025, FedSA-LoRA"),
    ShareSpec("fedsa-rslora", "lora", _roles(A=_A, B=_OWN_B), "2 r K",
              "mean of A", "Guo et al. 2025, FedSA-rsLoRA", rslora=True),
    ShareSpec("fedsa-vera", "vera", _roles(d=Role("shared", "built"), b=_OWN_B), "2 r",
              "mean of lambda_d", "Guo et al. 2025, FedSA-VeRA"),
    ShareSpec("fed-alora", "alora", _roles(A=_OWN_A, B=_B), "2 r N",
              "mean of B", "Ban & Ji 2025, Fed-ALoRA, equal ranks"),
    ShareSpec("fed-alora-het", "het", _roles(**_HET), "N d_m + min(r (N + d_m), N d_m)",
              "B += sum_i w_i B2_i B1_i, as the mean of B + B2_i B1_i", "Ban & Ji 2025, Fed-ALoRA, unequal ranks"),
    ShareSpec("local", "lora", _roles(A=_OWN_A, B=_OWN_B), "0",
              "none: nothing travels", "each client alone"),
)
# fmt: on

#: all methods by name
METHODS: Mapping[str, ShareSpec] = MappingProxyType({spec.name: spec for spec in _SPECS})


def share_spec(name: str, *, head: Lives = "private") -> ShareSpec:
    """The method with that name; classifier heads stay with their clients ("private") or are averaged too ("shared").

    A ValueError for another name, which lists the known ones, or another kind of head.
    """
    if name not in METHODS:
        raise ValueError(f"unknown federated method {name!r}; known are {', '.join(METHODS)}")
    if head not in ("private", "shared"):
        raise ValueError(f"head must be 'private' or 'shared', got {head!r}")
    return replace(METHODS[name], roles=_roles(**{**METHODS[name].roles, "head": Role(head, "built")}))
