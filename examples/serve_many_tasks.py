"""One server, many tasks in every batch: `python examples/serve_many_tasks.py`.

Starts `alora serve` here, sends it a mixed load by OpenAI's client, half of it streamed, and shows what came of it.
"""

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

import openai
import rich
import serve_kit
from serve_kit import Answer


async def ask(client: openai.AsyncOpenAI, base: str, task: str | None, prompt: str, stream: bool) -> Answer:
    """One request, as a stream or in one piece."""
    start, first, text, tokens = time.perf_counter(), None, "", 0
    asked: dict[str, Any] = {"model": task or base, "prompt": prompt, "max_tokens": 12, "temperature": 0}
    if not stream:
        done = await client.completions.create(**asked)
        return Answer(task, done.choices[0].text, done.usage.completion_tokens, time.perf_counter() - start)
    async for piece in await client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        if piece.choices:
            first = first or time.perf_counter() - start
            text += piece.choices[0].text
        else:  # the last one
            tokens = piece.usage.completion_tokens
    return Answer(task, text, tokens, time.perf_counter() - start, first)


async def ask_all(address: str, requests: list[tuple[str | None, str]]) -> list[Answer]:
    """All requests at once; the server takes as many into a batch as fit and lets the others wait."""
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300) as client:
        base = next(model.id for model in (await client.models.list()).data if not getattr(model, "parent", None))
        return await asyncio.gather(*(ask(client, base, *one, stream=i % 2 == 0) for i, one in enumerate(requests)))


def main(model: str = "smollm2-135m", requests: int = 48, output: str = "runs/serve-demo") -> dict[str, int]:
    """Serve, ask, show; return how many requests of each task were answered."""
    folder, note = serve_kit.adapter_folder(model, output)
    rich.print(f"adapter {folder}: {note}\nstarting `alora serve {model}` ...")
    with serve_kit.served(model, folder, Path(output) / "server.log") as (address, _):
        start = time.perf_counter()
        answers = asyncio.run(ask_all(address, serve_kit.prompts(requests)))
        answered = serve_kit.show(answers, time.perf_counter() - start)
        rich.print(serve_kit.memory(address))
    rich.print(f"the server has ended; `alora serve {model} --adapter {folder}` has a page at {serve_kit.PAGE}")
    return answered


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=48)
    main(**vars(parser.parse_args()))
