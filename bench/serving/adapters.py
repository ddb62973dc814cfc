"""Random adapters for `bench serving`, as an ALoRA folder and as stock LoRAs, and what stock PEFT says is right.

Speed does not depend on the numbers: one B, an A per task, so large that another task gives other tokens. Copies of the
base share its weights; a provider that merges gets its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .load import Outcome, Request

ALPHA_OVER_R = 2
STRENGTH = 0.25  # of s B A x beside W x, where both have entries of about 1
TIE = 1e-4  # of the largest logit: two float32 programs agree to about 1e-6; two tasks differ by 1e-2 or more


def sharing(model: Any) -> Any:
    """A copy with a config and modules of its own, over the same weights."""
    weights = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in weights})


@dataclass
class Adapters:
    """The numbers of all tasks, for a causal language model that this freezes; the first n are the same whatever n."""

    base: Any
    tasks: int
    r: int = 8
    a: dict[str, Tensor] = field(init=False, default_factory=dict)
    b: dict[str, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.base.requires_grad_(False)
        draw = torch.Generator().manual_seed(0)
        head = self.base.get_output_embeddings()
        for name, module in self.base.named_modules():
            if isinstance(module, nn.Linear) and module is not head:
                n, k = module.weight.shape
                self.a[name] = torch.randn(self.tasks, self.r, k, generator=draw) / k**0.5
                self.b[name] = torch.randn(n, self.r, generator=draw) * STRENGTH / self.r**0.5

    def name(self, task: int) -> str:
        """A name that is a folder's, a task's and a PEFT adapter's."""
        return f"task-{task:03d}"

    @property
    def lora_bytes(self) -> int:
        return self.a_bytes + self.b_bytes

    @cached_property
    def a_bytes(self) -> int:
        return sum(a[0].nbytes for a in self.a.values())

    @cached_property
    def b_bytes(self) -> int:
        return sum(b.nbytes for b in self.b.values())

    def write(self, folder: Path, tasks: int | Mapping[str, int], **metadata: str) -> Path:
        """An ALoRA folder of the first `tasks` tasks, or of those named; `metadata` beside the sums, or instead."""
        from safetensors.torch import save_file

        from alora_kernels import ALoRAConfig
        from alora_kernels.tensor_file import sums

        names = tasks if isinstance(tasks, Mapping) else {self.name(task): task for task in range(tasks)}
        rows = list(names.values())
        folder.mkdir(parents=True)
        tensors = {f"base_model.model.{name}.asymlora_A.weight": a[rows].contiguous() for name, a in self.a.items()}
        tensors |= {f"base_model.model.{name}.asymlora_B.weight": b for name, b in self.b.items()}
        said = {"format": "pt", **sums(tensors), **metadata}
        save_file(tensors, folder / "adapter_model.safetensors", metadata=said)
        config = ALoRAConfig(
            r=self.r,
            lora_alpha=ALPHA_OVER_R * self.r,
            tasks=list(names),
            target_modules=sorted(self.a),
            task_type="CAUSAL_LM",
            inference_mode=True,
        )
        config.save_pretrained(folder)
        return folder

    def stock(self, base: Any, tasks: Sequence[int]) -> Any:
        """A PEFT model with a stock LoRA of its own for each of the tasks, the first one active."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=self.r, lora_alpha=ALPHA_OVER_R * self.r, target_modules=sorted(self.a), task_type="CAUSAL_LM"
        )
        base.config.eos_token_id = base.generation_config.eos_token_id = None  # all generate to the given length
        model: Any = get_peft_model(base, config, adapter_name=self.name(tasks[0]))
        for task in tasks[1:]:
            model.add_adapter(self.name(task), config)
        for task in tasks:
            self.fill(model, self.name(task), task)
        return model.eval().requires_grad_(False)

    @torch.no_grad()
    def fill(self, model: Any, adapter: str, task: int) -> None:
        for name, a in self.a.items():
            layer = model.get_base_model().get_submodule(name)
            layer.lora_A[adapter].weight.copy_(a[task])
            layer.lora_B[adapter].weight.copy_(self.b[name])


@dataclass(frozen=True)
class Check:
    """Generated tokens against stock PEFT: how many were compared, how many are its most likely one (`equal`).

    `wrong` says what the first token is that is neither that nor tied with it; empty if there is none.
    """

    tokens: int = 0
    equal: int = 0
    wrong: str = ""


class Truth:
    """Stock PEFT, one LoRA, one request at a time, no padding and no cache: the plainest way there is."""

    def __init__(self, base: Any, adapters: Adapters) -> None:
        self._base, self._adapters, self._held = base, adapters, 0

    @cached_property
    def _model(self) -> Any:
        return self._adapters.stock(sharing(self._base), [0])

    def check(self, outcomes: Sequence[Outcome], new_tokens: int) -> Check:
        """Whether every token is the most likely one after the prompt and the tokens before it, or tied with it.

        The tokens so far are those that were generated, so a tie that went the other way is one token that differs and
        not a whole answer.
        """
        tokens = equal = 0
        for outcome in sorted(outcomes, key=lambda o: -1 if o.request.task is None else o.request.task):
            if len(outcome.tokens) != new_tokens:
                return Check(tokens, equal, f"{len(outcome.tokens)} tokens instead of {new_tokens}")
            logits = self._logits(outcome.request, outcome.tokens)
            chosen = logits.gather(1, torch.tensor(outcome.tokens)[:, None])[:, 0]
            behind = (logits.amax(1) - chosen) / logits.abs().amax(1)
            equal += int((logits.argmax(1) == torch.tensor(outcome.tokens)).sum())
            tokens += new_tokens
            if (worst := float(behind.max())) > TIE:
                where = f"task {outcome.request.task}, token {int(behind.argmax())}"
                return Check(tokens, equal, f"{where} is {worst:.1e} of the largest logit below the most likely one")
        return Check(tokens, equal)

    def answer(self, request: Request, new_tokens: int) -> tuple[list[int], list[float]]:
        """The greedy answer, and how far each token was above the next best one, as a share of the largest logit."""
        tokens: list[int] = []
        margins = []
        for _ in range(new_tokens):
            logits = self._logits(request, [*tokens, 0])[-1]
            best = logits.topk(2)
            tokens.append(int(best.indices[0]))
            margins.append(float((best.values[0] - best.values[1]) / logits.abs().max()))
        return tokens, margins

    @torch.no_grad()
    def _logits(self, request: Request, tokens: Sequence[int]) -> Tensor:
        """[n, V]: of each generated token's place."""
        ids = torch.tensor([[*request.prompt, *tokens[:-1]]])
        if request.task is None:
            with self._model.disable_adapter():
                return self._model(input_ids=ids, logits_to_keep=len(tokens)).logits[0]
        if request.task != self._held:
            self._adapters.fill(self._model, self._adapters.name(0), request.task)
            self._held = request.task
        return self._model(input_ids=ids, logits_to_keep=len(tokens)).logits[0]


class GreedyTruth(Truth):
    """For servers that answer in text: how much of each is stock PEFT's greedy answer, until the first tie.

    `tie`, a share of the largest logit, is as far as the dtype of the servers may move two of them.
    """

    def __init__(self, base: Any, adapters: Adapters, tokenizer: Any, tie: float = TIE) -> None:
        super().__init__(base, adapters)
        self._tokenizer, self._tie = tokenizer, tie
        self._known: dict[tuple[Request, int], tuple[list[int], list[float]]] = {}

    def check(self, outcomes: Sequence[Outcome], new_tokens: int) -> Check:
        """Whether every answer leaves stock PEFT's only where that one hesitated."""
        tokens = equal = 0
        for outcome in outcomes:
            key = (outcome.request, new_tokens)
            if key not in self._known:
                self._known[key] = self.answer(*key)
            ids, margins = self._known[key]
            same = next((n for n in range(new_tokens, 0, -1) if outcome.text.startswith(self._text(ids[:n]))), 0)
            tokens, equal = tokens + new_tokens, equal + same
            # half a character's tokens show as one sign that another end of it changes: it begins up to two before
            if len(outcome.tokens) != new_tokens or (same < new_tokens and min(margins[same : same + 3]) > self._tie):
                said = f"task {outcome.request.task}: {outcome.text!r} instead of {self._text(ids)!r}"
                return Check(tokens, equal, f"{said}, {len(outcome.tokens)} tokens")
        return Check(tokens, equal)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
