#!/usr/bin/env bash
# Two nodes, tried on one machine: examples/two_nodes.sh recipe.yaml [options of `alora train`]
# On two machines run what `node` runs, with --node-rank 0 and 1, HOST the first machine's address, and an output
# folder that both see: the first process writes it, --resume reads it everywhere.
set -euo pipefail
HOST=${HOST:-127.0.0.1} PORT=${PORT:-29519} PROCESSES=${PROCESSES:-1} # processes of a node: its GPUs

node() {
  exec "${PYTHON:-python}" -m torch.distributed.run --nnodes 2 --node-rank "$1" --nproc-per-node "$PROCESSES" \
    --master-addr "$HOST" --master-port "$PORT" -m alora_kernels train "${@:2}"
}

node 0 "$@" & first=$!
node 1 "$@" & second=$!
trap 'kill $first $second 2>/dev/null || true' EXIT
wait -n && wait -n
