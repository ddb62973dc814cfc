"""One federated run as data: what `alora fed run CONFIG.yaml` reads and what server and clients share.

From YAML text or keyword arguments to a frozen `FedConfig`; unknown keys and wrong values are refused, all at once,
with the key's path. The same text goes to every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..modules.adapter import lora_scaling
from ..settings import mistakes, read_yaml, write_yaml
from ..text import NAME
from .share_specs import ShareSpec, share_spec
from .wire import finite


@dataclass(frozen=True)
class Limits:
    """When a round counts, and when to give up."""

    quorum: int = 2  # accepted replies a round needs, and nodes it waits for
    deadline: float = 600.0  # seconds a round, and the wait for nodes, may take
    norm_cap: float | None = None  # largest L2 norm of reply - sent over all arrays; None: sqrt(number of values)
    max_examples: int = 1_000_000  # largest weight a client may claim
    patience: int = 3  # rounds in a row without a quorum before the run stops

    def __post_init__(self) -> None:
        for name in ("quorum", "max_examples", "patience"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if not (finite(self.deadline) and self.deadline > 0):
            raise ValueError(f"deadline must be a number of seconds > 0, got {self.deadline!r}")
        if self.norm_cap is not None and not (finite(self.norm_cap) and self.norm_cap > 0):
            raise ValueError(f"norm_cap must be a number > 0, or None for its default, got {self.norm_cap!r}")


@dataclass(frozen=True)
class DpSettings:
    """Client-level differential privacy with fixed clipping.

    Formula: `noise std = noise_multiplier * clipping_norm / number of sampled clients`, on each value of the mean.

    Accounting needs plain fedavg, equal weights, and every sampled client's reply: a round with one missing is void.
    Without it there is noise but no statement about privacy.
    """

    noise_multiplier: float  # z of the Gaussian mechanism; 0 only without accounting
    clipping_norm: float  # cap on the L2 norm of one client's whole update
    delta: float = 1e-5  # of the (epsilon, delta) that is reported
    max_epsilon: float | None = None  # the run stops before this is exceeded; None only reports
    side: Literal["server", "client"] = "server"  # who clips; clients must be trusted to
    accounting: bool = True  # keep count of epsilon

    def __post_init__(self) -> None:
        if not 0 <= self.noise_multiplier < inf:
            raise ValueError(f"noise_multiplier must be >= 0, got {self.noise_multiplier}")
        if self.accounting and self.noise_multiplier == 0:
            raise ValueError("noise_multiplier must be > 0 for accounting; pass accounting=False to clip only")
        if not 0 < self.clipping_norm < inf:
            raise ValueError(f"clipping_norm must be > 0, got {self.clipping_norm}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must be between 0 and 1, got {self.delta}")
        if self.max_epsilon is not None and not 0 < self.max_epsilon < inf:
            raise ValueError(f"max_epsilon must be > 0 or None, got {self.max_epsilon}")
        if self.max_epsilon is not None and not self.accounting:
            raise ValueError("max_epsilon needs accounting=True")
        if self.side not in ("server", "client"):
            raise ValueError(f"side must be 'server' or 'client', got {self.side!r}")


NO_SECAGG = (
    "secure aggregation is not offered: Flower has SecAgg+ only in its legacy workflow, and a server that cannot see "
    "single updates cannot check them for bad values; dp protects what the server passes on, not from itself"
)


class ConfigError(ValueError):
    """A configuration that cannot be run; one line per mistake."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ClientConfig(_Frozen):
    """One client."""

    name: str = Field(pattern=f"^{NAME.pattern}$")  # it names a folder
    task: str | None = None  # built-in, .jsonl file or hub id; on a real machine the client may name its own file
    rank: int | None = Field(default=None, ge=1)  # its own, for `fed-alora-het`


class StrategyConfig(_Frozen):
    """A Flower strategy by name ("fedmedian", see `strategies.build_strategy`), and its own arguments."""

    name: str = "fedavg"
    options: dict[str, Any] = Field(default_factory=dict)


class FedConfig(_Frozen):
    """A federated run.

    `model` and what follows only the built-in participants read (`alora_kernels.recipes.federated`): who brings models
    and data of their own may leave it out.
    """

    method: str  # key of `share_specs.METHODS`
    clients: tuple[ClientConfig, ...] = Field(min_length=1)  # who may take part
    rounds: int = Field(default=6, ge=1)  # in all
    rank: int = Field(default=8, ge=1)
    lora_alpha: float | None = Field(default=None, gt=0)  # twice the rank by default
    target_modules: str | tuple[str, ...] = "all-linear"
    d_m: int = Field(default=16, ge=1)  # rank of the space that clients of unequal rank share
    head: Literal["private", "shared"] = "private"  # of a classifier
    seed: int = Field(default=0, ge=0)  # of everything that is drawn
    metrics: tuple[str, ...] = Field(default=("accuracy", "loss"), min_length=1)  # the first counts; higher is better
    weights: Literal["examples", "equal"] = "examples"  # in the mean; "equal" also keeps the count secret
    strategy: StrategyConfig = StrategyConfig()  # how the server aggregates
    guard: Limits = Limits()  # limits on replies, quorum and deadline
    dp: DpSettings | None = None  # differential privacy
    secagg: bool = False  # refused, with the reason
    reset_private: bool = False  # they begin each round anew, as in the authors' released code: for comparison only
    base_check: Literal["names", "data"] = "names"  # of frozen weights: names and shapes, or data too
    output: Path = Path("runs/fed")  # ledger, checkpoints and plots; on one machine the clients' private parts too
    model: str = "minilm"  # or "smollm2-135m", a folder or a hub id
    kind: Literal["encoder", "causal"] | None = None  # a classifier, or answers in words; None: by the model's name
    local_steps: int = Field(default=6, ge=1)  # AdamW, fresh each round
    batch_size: int = Field(default=16, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    train_size: int | None = Field(default=2000, ge=1)  # rows per client, as `test_size`
    test_size: int = Field(default=200, ge=1)
    max_length: int = Field(default=64, ge=1)  # tokens per row

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        return share_spec(method).name

    @field_validator("clients", mode="before")
    @classmethod
    def _by_name(cls, clients: Any) -> Any:
        """A mapping name -> fields, or a list of names, is as good as a list of mappings."""
        if isinstance(clients, dict):
            return [{"name": name, **(fields or {})} for name, fields in clients.items()]
        return [{"name": c} if isinstance(c, str) else c for c in clients] if isinstance(clients, list) else clients

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = [client.name for client in self.clients]
        if len(set(names)) < len(names):
            raise ValueError(f"clients: names must differ, got {', '.join(names)}")
        if self.spec.adapter == "het":
            if self.lora_alpha is not None:
                raise ValueError("lora_alpha: unequal ranks use alpha = 2 r for every client; leave it out")
        elif any(client.rank is not None for client in self.clients):
            raise ValueError(f"clients: {self.method} needs one rank for all; for unequal ranks use fed-alora-het")
        if self.guard.quorum > len(self.clients):
            raise ValueError(f"guard.quorum: {self.guard.quorum} of {len(self.clients)} clients can never be reached")
        if self.secagg:
            raise ValueError(NO_SECAGG)
        if self.dp is not None and not self.spec.living("shared"):
            raise ValueError(f"dp: with {self.method} nothing travels that could be protected; leave it out")
        if self.dp is not None and self.dp.accounting and self.weights != "equal":
            raise ValueError("weights: the privacy accountant needs `weights: equal` (or set dp.accounting: false)")
        return self

    @property
    def spec(self) -> ShareSpec:
        """The method."""
        return share_spec(self.method, head=self.head)

    @property
    def clients_clip(self) -> bool:
        """Whether clients clip their own updates."""
        return self.dp is not None and self.dp.side == "client"

    def client(self, name: str) -> ClientConfig:
        """The client of that name; ConfigError if there is none."""
        for client in self.clients:
            if client.name == name:
                return client
        raise ConfigError(f"no client {name!r}; the configuration has {', '.join(c.name for c in self.clients)}")

    def rank_of(self, name: str) -> int:
        """The rank of a client."""
        return self.client(name).rank or self.rank

    @property
    def scaling(self) -> float:
        """s, the same for every client."""
        if self.spec.adapter == "vera":
            return 1.0
        return lora_scaling(self.lora_alpha or 2 * self.rank, self.rank, self.spec.rslora)

    @classmethod
    def from_yaml(cls, text: str, source: str = "configuration") -> FedConfig:
        """Parse YAML, called `source` in errors; a ConfigError says every mistake, one a line."""
        try:
            values = read_yaml(text)
        except ValueError as error:
            raise ConfigError(f"{source} is {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{source} must hold a mapping, for example `method: fed-alora`")
        return cls.from_values(values, source)

    @classmethod
    def from_values(cls, values: dict[str, Any], source: str = "configuration") -> FedConfig:
        """As `from_yaml`, of a mapping."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError("\n  ".join([f"{source}:", *mistakes(error, cls)])) from None

    def to_yaml(self) -> str:
        """YAML that `from_yaml` reads back."""
        return write_yaml(self.model_dump(mode="json", exclude_defaults=True))


def load_config(path: Path) -> FedConfig:
    """Read a configuration file; a ConfigError if it cannot be read, or is wrong."""
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    return FedConfig.from_yaml(text, str(path))
