"""The whole pipeline on a Ray cluster of two nodes with nothing but a network between them, beside the same run in one process.

    sudo .venv/bin/python -m benchmarks.two_nodes

Two network namespaces stand for two machines (Linux, root, iproute2): each has its own address and its own Ray node with one CPU,
so that two workers need both; files are shared, as on a cluster's file system. Handwritten digits and a small random encoder.
"""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
import yaml

from pipelines import demo
from sanitize.config import EncoderSpec
from sanitize.stages.encoders import build_backbone

ROOT = Path(__file__).parents[1]
NODES = {"sanitize-a": "10.77.0.1", "sanitize-b": "10.77.0.2"}
HEAD, OTHER = NODES
ADDRESS = f"{NODES[HEAD]}:6399"
SECRET = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # Ray asks every node of a cluster for it
ENVIRONMENT = {**os.environ, **SECRET, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
WAIT = f"""
import ray, time
for _ in range(60):
    try:
        ray.init({ADDRESS!r}, log_to_driver=False)
        break
    except ConnectionError:
        time.sleep(1)
while len(ray.nodes()) < 2:
    time.sleep(1)
print("nodes:", *(node["NodeManagerAddress"] for node in ray.nodes()))
"""


def main() -> None:
    if os.geteuid() != 0:
        raise SystemExit("error: network namespaces need root. Run this with sudo.")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_inputs()
        alone = pipeline("--out", "alone", "--workers", "0")
        with cluster() as head:
            together = pipeline("--out", "cluster", "--workers", "2", "--address", ADDRESS, node=head)
        reports = [json.loads(next(Path(out).glob("report-*.json")).read_text()) for out in ("alone", "cluster")]
        for arm in reports[0]["arms"]:
            samples, rates = zip(
                *((r["arms"][arm]["samples"], r["arms"][arm]["clean_accuracy"]) for r in reports), strict=True
            )
            print(
                f"{arm}: {samples[0]} samples, accuracy {rates[0]:.4f} alone; {samples[1]} and {rates[1]:.4f} on two nodes"
            )
            if samples[0] != samples[1] or abs(rates[0] - rates[1]) > 0.02:
                raise SystemExit("error: the two runs differ")
        print(
            f"{alone:.0f} s in one process, {together:.0f} s on two nodes of one CPU each, start of all workers included"
        )


def write_inputs() -> None:
    """Digits as shards of 250 samples, an encoder, and the pipeline's YAML."""
    demo.write_shards(250)
    torch.manual_seed(0)
    spec = EncoderSpec("resnet10-cifar", image_size=32, width=8, stem_stride=2)
    safetensors.torch.save_file(build_backbone(spec).eval().state_dict(), "encoder.safetensors")
    values = {"architecture": spec.architecture, "image_size": 32, "width": 8, "stem_stride": 2}
    Path("encoder.yaml").write_text(yaml.safe_dump(values | {"weights": "encoder.safetensors"}))
    settings = {
        "out": "out",
        "train": ["demo/aux/*.tar"],
        "auxiliary": ["demo/incoming/*.tar"],
        "validation": ["demo/incoming/*.tar"],
        "encoder": "encoder.yaml",
        "fit": {"training": {"epochs": 10, "batch_size": 64}},
        "finetune": {"mode": "mlp", "epochs": 20, "batch_size": 64},
        "cpus_per_worker": 1,
    }
    Path("pipeline.yaml").write_text(yaml.safe_dump(settings))


def pipeline(*arguments: str, node: int = 0) -> float:
    start = time.monotonic()
    run("python", "-m", "pipelines.clean_then_finetune", "pipeline.yaml", *arguments, node=node)
    return time.monotonic() - start


def run(program: str, *arguments: str, node: int = 0) -> None:
    """A program of this virtual environment, where the process `node` lives (0 = here)."""
    place = ["nsenter", f"--target={node}", "--mount", "--net", f"--wd={Path.cwd()}"] if node else []
    command = [*place, str(Path(sys.executable).with_name(program)), *arguments]
    done = subprocess.run(command, env=environment(HEAD), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    print(done.stdout.strip(), flush=True)


def environment(node: str) -> dict[str, str]:
    # Gloo binds to what the host name resolves to, here the loopback; name the interface, as on clusters where that is so
    return {**ENVIRONMENT, "GLOO_SOCKET_IFNAME": node}


@contextlib.contextmanager
def cluster() -> Iterator[int]:
    """Yields a process that lives on the head node."""
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        subprocess.run(["ip", "link", "add", HEAD, "type", "veth", "peer", "name", OTHER], check=True)
        for node, address in NODES.items():
            subprocess.run(["ip", "netns", "add", node], check=True)
            subprocess.run(["ip", "link", "set", node, "netns", node], check=True)
            for words in (f"addr add {address}/24 dev {node}", f"link set {node} up", "link set lo up"):
                subprocess.run(["ip", "-n", node, *words.split()], check=True)
        port = ADDRESS.rpartition(":")[2]
        nodes.append(start_node(HEAD, "--head", f"--port={port}", "--include-dashboard=false"))
        time.sleep(20)  # a node that finds no head gives up
        nodes.append(start_node(OTHER, f"--address={ADDRESS}"))
        run("python", "-c", WAIT, node=nodes[0].pid)
        yield nodes[0].pid
    finally:
        for node in NODES:
            found = subprocess.run(["ip", "netns", "pids", node], capture_output=True, text=True, check=False)
            subprocess.run(["kill", "-9", *found.stdout.split()], check=False, capture_output=True)
            subprocess.run(["ip", "netns", "del", node], check=False, capture_output=True)


def start_node(node: str, *arguments: str) -> "subprocess.Popen[bytes]":
    """A Ray node with an address and a /tmp/ray of its own."""
    apart = 'mkdir -p /tmp/ray && mount -t tmpfs none /tmp/ray && exec "$@"'
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1", "--disable-usage-stats"]
    command = ["ip", "netns", "exec", node, "unshare", "--mount", "sh", "-c", apart, "sh", *ray, *arguments]
    command += [f"--node-ip-address={NODES[node]}"]
    return subprocess.Popen(command, env=environment(node), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
