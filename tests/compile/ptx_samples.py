"""PTX of the kernels that wait for each other, and of loops whose operand dropout masks; `report` prints it as JSON."""

from __future__ import annotations

import json
from dataclasses import replace

from bench.static.aot import Job, build, jobs, short_name


def report() -> None:
    """Print the PTX of a few kernels on sm_90: the first job of each, without or with dropout, as it is launched.

    "pipelined" is the loop of `shrink_soft` under dropout with as many stages as without.
    """
    found: dict[str, str] = {}
    kernels = ("one_pass_task", "one_pass_soft", "decode", "shrink_soft")
    for job in jobs(["sm_90"], kernels):
        name = short_name(job.kernel)
        if name not in found and dict(job.constexprs).get("HAS_DROPOUT", False) == (name == "shrink_soft"):
            found[name] = build(job).asm["ptx"]
            found |= {"pipelined": build(with_stages(job, 3)).asm["ptx"]} if name == "shrink_soft" else {}
    print(json.dumps(found))


def with_stages(job: Job, stages: int) -> Job:
    """The same job with so many stages in its loop over x."""
    constexprs = tuple((name, stages if name == "STAGES" else value) for name, value in job.constexprs)
    return replace(job, constexprs=constexprs)
