#!/bin/bash
# Scan on one node with all its GPUs: sbatch slurm_one_node.sh. A job that is killed and queued again goes on where it stopped.
#SBATCH --job-name=sanitize --nodes=1 --gpus=4 --cpus-per-task=32 --time=04:00:00 --requeue
set -euo pipefail
sanitize scan "${SHARDS:-/data/shards}" --detector "${DETECTOR:-/data/detector}" --out "${OUT:-/data/scanned}" --cpus-per-worker 8
sanitize verify "${OUT:-/data/scanned}"
