#!/usr/bin/env bash
# transformers' Trainer with `fsdp` and `use_cpu`, two processes of torchrun over gloo.
# Guess: as torch's fully_shard works on CPUs with gloo, each process holds a half of the weights; or it is refused.
# Seen: no word, and no sharding: accelerate drops the request where the device is a CPU, and the processes train as DDP
# does, each with whole parameters. The same plugin, put into accelerate's state by hand, shards and trains.
# Guard: `parallel: fsdp` shards on CPUs too
# (tests/training/test_processes.py::test_the_adapter_is_that_of_one_process).
# Exits with 0 if that is still so, with 1 if the behaviour has changed. Needs Python 3.11 or newer and the network.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cat >"$work/train.py" <<'PYTHON'
import os
import sys
import warnings

import accelerate
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.arange(32).reshape(8, 4)]


class ByHand(transformers.Trainer):
    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        PartialState._shared_state["distributed_type"] = state.distributed_type = DistributedType.FSDP
        self.is_fsdp_enabled = True


torch.manual_seed(0)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **SIZES))
arguments = transformers.TrainingArguments(
    sys.argv[2], per_device_train_batch_size=2, max_steps=2, fsdp=True, use_cpu=True, report_to=[], disable_tqdm=True,
    save_strategy="no",
)
trainer = {"asked": transformers.Trainer, "by hand": ByHand}[sys.argv[1]](model, arguments, train_dataset=ROWS)
trainer.train()
if int(os.environ["RANK"]) == 0:
    sharded = sum(isinstance(p, DTensor) for p in trainer.model.parameters())
    print(f"transformers {transformers.__version__}, accelerate {accelerate.__version__}, torch {torch.__version__}")
    print(f"fsdp {sys.argv[1]}: {trainer.accelerator.distributed_type}, {sharded} sharded parameters", flush=True)
    raise SystemExit((sharded > 0) != (sys.argv[1] == "by hand"))
PYTHON
cd "$work"
for way in "asked" "by hand"; do
  OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$work/venv/bin/python" -m torch.distributed.run --nproc-per-node 2 train.py "$way" "$work/out"
done
