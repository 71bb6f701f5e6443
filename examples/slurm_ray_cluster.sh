#!/bin/bash
# Scan on several nodes: Ray starts inside the allocation, and the command joins it. sbatch slurm_ray_cluster.sh
#SBATCH --job-name=sanitize --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64 --time=12:00:00 --requeue
set -euo pipefail

PORT=6379
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # not `head`, which may leave before the list ends: SIGPIPE
workers=$((SLURM_JOB_NUM_NODES - 1))
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | base64 | tr -d '/+=\n') # srun hands it to every node of this job
export RAY_AUTH_TOKEN

wait_for_nodes() { # until so many have joined; ten minutes at most
    for _ in $(seq 120); do
        joined=$(python -c 'import sys, ray; ray.init(address=sys.argv[1], logging_level="ERROR"); print(len(ray.nodes()))' \
            "$head:$PORT" 2>/dev/null || echo 0)
        if [ "$joined" -ge "$1" ]; then return 0; fi
        sleep 5
    done
    echo "only $joined of $1 nodes joined Ray" >&2
    return 1
}

# each `ray start` blocks until the allocation ends
srun --nodes=1 --ntasks=1 --overlap -w "$head" \
    ray start --head --port "$PORT" --metrics-export-port 8080 --disable-usage-stats --block &
wait_for_nodes 1
if [ "$workers" -gt 0 ]; then
    srun --nodes="$workers" --ntasks="$workers" --overlap --exclude="$head" \
        ray start --address "$head:$PORT" --metrics-export-port 8080 --disable-usage-stats --block &
fi
wait_for_nodes "$SLURM_JOB_NUM_NODES"
# this script runs on the first node, which is the head
sanitize scan "${SHARDS:-/nfs/shards}" --detector "${DETECTOR:-/nfs/detector}" --out "${OUT:-/nfs/scanned}" \
    --address "$head:$PORT" --cpus-per-worker 7
sanitize verify "${OUT:-/nfs/scanned}"
