"""How many kernels Triton would compile for layers of so many rows: `python keys.py ROUTING ROWS ...` prints JSON.

A key is what Triton looks a kernel up by: types, alignments, constants and options of a launch.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict

import torch

from alora_kernels import kernels
from bench.static.aot import short_name, to_job
from bench.static.cases import Case, run_case

keys = defaultdict(set)
with kernels.recording("sm_90") as launches:
    for rows in sys.argv[2:]:
        run_case(Case(sys.argv[1], torch.bfloat16, m=int(rows), k=512, n=512))
for launch in launches:
    job = to_job("sm_90", launch)
    keys[short_name(job.kernel)].add((job.signature, job.constexprs, job.attributes, job.options))
print(json.dumps({kernel: len(found) for kernel, found in keys.items()}))
