"""Every method in float64 NumPy, gradients by hand: what the toy problem must give, without torch, PEFT or Flower.

y = x W^T + s (x A^T) B^T, loss = mean over rows of half the squared error, so dL/dy = (y - t) / rows =: e. Then
dB = s e^T (x A^T) and dA = s B^T e^T x; the other methods follow by the chain rule.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from alora_kernels.federated.model import kaiming, seed_of

Arrays = dict[str, np.ndarray]


def draw(shape: tuple[int, ...], seed: int, *words: str) -> np.ndarray:
    return kaiming(shape, seed_of(seed, *words))


class Lora:
    """A and B; `shared` and `trained` say which of them travel and learn."""

    shared: tuple[str, ...] = ()
    trained: tuple[str, ...] = ("A", "B")
    own_a = False
    rank_stabilised = False

    def __init__(self, w: np.ndarray, rank: int, d_m: int, seed: int, client: str) -> None:
        self.w = w
        self.s = 2 * rank / (np.sqrt(rank) if self.rank_stabilised else rank)
        words = (client, "proj.A") if self.own_a else ("proj.A",)
        self.p: Arrays = {"A": draw((rank, w.shape[1]), seed, *words), "B": np.zeros((w.shape[0], rank))}

    def forward(self, x: np.ndarray) -> np.ndarray:
        return x @ self.w.T + self.s * (x @ self.p["A"].T) @ self.p["B"].T

    def gradients(self, x: np.ndarray, e: np.ndarray) -> Arrays:
        a, b = self.p["A"], self.p["B"]
        return {"A": self.s * b.T @ e.T @ x, "B": self.s * e.T @ (x @ a.T)}

    def receive(self, shared: Mapping[str, np.ndarray]) -> None:
        self.p |= {role: value.copy() for role, value in shared.items()}

    def give(self) -> Arrays:
        return {role: self.p[role].copy() for role in self.shared}


class FedIT(Lora):
    shared = ("A", "B")


class Ffa(Lora):
    shared, trained = ("B",), ("B",)


class FedSa(Lora):
    shared = ("A",)


class FedSaRs(FedSa):
    rank_stabilised = True


class FedAlora(Lora):
    shared = ("B",)
    own_a = True


class Local(Lora):
    own_a = True


class FedSaVera(Lora):
    """y = x W^T + b * ((x VA^T * d) VB^T), VA and VB frozen; PEFT begins d at float32's 0.1."""

    shared, trained = ("d",), ("d", "b")
    projections: Arrays  # {"VA", "VB"}, set by the test from PEFT's seed

    def __init__(self, w: np.ndarray, rank: int, d_m: int, seed: int, client: str) -> None:
        self.w = w
        self.p = {"d": np.full(rank, np.float64(np.float32(0.1))), "b": np.zeros(w.shape[0])}

    def forward(self, x: np.ndarray) -> np.ndarray:
        return x @ self.w.T + (x @ self.projections["VA"].T * self.p["d"]) @ self.projections["VB"].T * self.p["b"]

    def gradients(self, x: np.ndarray, e: np.ndarray) -> Arrays:
        inner, vb = x @ self.projections["VA"].T, self.projections["VB"]
        return {
            "d": ((e * self.p["b"]) @ vb * inner).sum(0),
            "b": (e * ((inner * self.p["d"]) @ vb.T)).sum(0),
        }


class FedAloraHet(Lora):
    """A := M A, B := B + B2 B1; B2 begins each round at zero; B + B2 B1 is what a client gives."""

    shared, trained = ("B",), ("A", "M", "B1", "B2")

    def __init__(self, w: np.ndarray, rank: int, d_m: int, seed: int, client: str) -> None:
        self.w, self.s = w, 2.0
        self.p = {
            "A": draw((rank, w.shape[1]), seed, client, "proj.A"),
            "M": draw((d_m, rank), seed, client, "proj.M"),
            "B1": draw((rank, d_m), seed, client, "proj.B1"),
            "B2": np.zeros((w.shape[0], rank)),
            "B": np.zeros((w.shape[0], d_m)),
        }

    @property
    def merged(self) -> np.ndarray:
        return self.p["B"] + self.p["B2"] @ self.p["B1"]

    def forward(self, x: np.ndarray) -> np.ndarray:
        return x @ self.w.T + self.s * (x @ (self.p["M"] @ self.p["A"]).T) @ self.merged.T

    def gradients(self, x: np.ndarray, e: np.ndarray) -> Arrays:
        p = self.p
        da, db = self.s * self.merged.T @ e.T @ x, self.s * e.T @ (x @ (p["M"] @ p["A"]).T)
        return {"A": p["M"].T @ da, "M": da @ p["A"].T, "B1": p["B2"].T @ db, "B2": db @ p["B1"].T}

    def receive(self, shared: Mapping[str, np.ndarray]) -> None:
        super().receive(shared)
        self.p["B2"] = np.zeros_like(self.p["B2"])

    def give(self) -> Arrays:
        return {"B": self.merged}


METHODS: dict[str, type[Lora]] = {
    "fedit": FedIT,
    "ffa-lora": Ffa,
    "fedsa-lora": FedSa,
    "fedsa-rslora": FedSaRs,
    "fedsa-vera": FedSaVera,
    "fed-alora": FedAlora,
    "fed-alora-het": FedAloraHet,
    "local": Local,
}


def train(model: Lora, x: np.ndarray, target: np.ndarray, steps: int, lr: float) -> None:
    """Full-batch gradient descent."""
    for _ in range(steps):
        gradients = model.gradients(x, (model.forward(x) - target) / len(x))
        for role in model.trained:
            model.p[role] = model.p[role] - lr * gradients[role]


def federated(
    models: Mapping[str, Lora], data: Mapping[str, tuple[np.ndarray, np.ndarray]], rounds: int, steps: int, lr: float
) -> Arrays:
    """The shared arrays after so many rounds; each model keeps its private ones."""
    total = sum(len(x) for x, _ in data.values())
    shared = next(iter(models.values())).give()
    for _ in range(rounds):
        given = []
        for name, model in models.items():
            model.receive(shared)
            train(model, *data[name], steps, lr)
            given.append((len(data[name][0]) / total, model.give()))
        shared = {role: sum(weight * arrays[role] for weight, arrays in given) for role in shared}
    return shared
