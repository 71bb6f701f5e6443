"""examples/ and the Dockerfile: they parse, and what they call is there with its options. Nobody has run them on a cluster."""

import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from builders import write_shards

from sanitize.cli import main

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.sh"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def commands(text: str) -> list[list[str]]:
    """Every `sanitize ...` of a shell text, continuations resolved, as words."""
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("sanitize ")]


def require_known(words: list[str]) -> None:
    name, *arguments = words
    options = {flag for p in main.commands[name].params if isinstance(p, click.Option) for flag in p.opts}
    assert {a.partition("=")[0] for a in arguments if a.startswith("--")} <= options


@pytest.fixture
def job() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "examples" / "rayjob.yaml").read_text())


# ---------------------------------------------------------------- Slurm


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_a_script_is_one_and_calls_commands_that_there_are(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert script.stat().st_mode & 0o111, "not executable"
    called = commands(script.read_text())
    assert {words[0] for words in called} == {"scan", "verify"}
    for words in called:
        require_known(words)


SLURM = {  # stands in for the cluster: who is called with what
    "scontrol": 'printf "node1\\nnode2\\nnode3\\n"',
    "srun": "exec sleep 5",
    "python": "echo 3",
    "sanitize": "",
}


def test_the_cluster_script_starts_ray_on_every_node_before_it_scans(tmp_path):
    log = tmp_path / "log"
    for name, does in SLURM.items():
        (tmp_path / name).write_text(f'#!/bin/bash\necho {name} "$@" "token=${{#RAY_AUTH_TOKEN}}" >> {log}\n{does}\n')
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_JOB_NUM_NODES": "3",
        "OUT": "/nfs/mine",
    }
    subprocess.run([ROOT / "examples" / "slurm_ray_cluster.sh"], env=environment, check=True, timeout=60)
    lines = log.read_text().splitlines()
    starts = [line for line in lines if line.startswith("srun")]
    assert "-w node1 ray start --head --port 6379" in starts[0]
    assert "--nodes=2 --ntasks=2 --overlap --exclude=node1 ray start --address node1:6379" in starts[1]
    scan, verify = (line for line in lines if line.startswith("sanitize"))
    assert "--out /nfs/mine --address node1:6379" in scan
    assert verify.startswith("sanitize verify /nfs/mine")
    assert all(int(line.rpartition("token=")[2]) >= 32 for line in starts)
    assert lines.index(scan) > max(lines.index(line) for line in starts)


# ---------------------------------------------------------------- Kubernetes


def test_the_ray_job_scans_with_options_that_there_are(job):
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    (words,) = commands(job["spec"]["entrypoint"])
    require_known(words)
    assert words[0] == "scan"
    assert words[words.index("--address") + 1] == "auto"


def test_the_ray_job_asks_for_what_its_cluster_has(job):
    (words,) = commands(job["spec"]["entrypoint"])
    asked = {flag: int(words[words.index(flag) + 1]) for flag in words if flag.startswith("--") and "per" in flag}
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    has = container["resources"]["limits"]
    assert int(words[words.index("--workers") + 1]) == group["replicas"] == group["minReplicas"]
    assert asked["--cpus-per-worker"] < int(has["cpu"])
    assert asked["--gpus-per-worker"] == int(has["nvidia.com/gpu"])
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]
    images = {c["image"] for g in (head, group) for c in g["template"]["spec"]["containers"]}
    assert len(images) == 1, "every node needs the same packages"


# ---------------------------------------------------------------- container


def test_the_image_is_built_from_files_and_extras_that_there_are():
    text = (ROOT / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (?!--)(.*)", text, re.MULTILINE) for name in line.split()[:-1]]
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == kept
    assert all((ROOT / name).exists() for name in copied)
    extras = re.search(r"^ARG EXTRAS=(.*)", text, re.MULTILINE)[1].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])


def test_the_image_asks_for_the_torch_that_the_package_asks_for():
    text = (ROOT / "Dockerfile").read_text()
    asked = set(re.findall(r'"(torch(?:vision)?>=[\d.]+)"', text))
    assert asked == {name for name in PROJECT["dependencies"] if name.startswith("torch")}


# ---------------------------------------------------------------- Airflow


class Failed(Exception):
    """Stands in for AirflowFailException."""


@pytest.fixture
def dag(monkeypatch) -> dict[str, Any]:
    """The names of the DAG's file. Airflow is not installed here: its decorators do nothing."""
    sdk, exceptions = types.ModuleType("airflow.sdk"), types.ModuleType("airflow.sdk.exceptions")
    vars(sdk).update(dag=lambda **_: lambda _function: lambda: None, task=lambda function: function)
    vars(exceptions).update(AirflowFailException=Failed)
    for name, module in (
        ("airflow", types.ModuleType("airflow")),
        ("airflow.sdk", sdk),
        (exceptions.__name__, exceptions),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    return runpy.run_path(str(ROOT / "examples" / "airflow_dag.py"))


@pytest.fixture
def on_path(tmp_path, monkeypatch) -> None:
    """`sanitize` as a command, in an empty folder."""
    program = tmp_path / "bin" / "sanitize"
    program.parent.mkdir()
    program.write_text(f'#!/bin/bash\nexec {sys.executable} -m sanitize.cli "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    monkeypatch.chdir(tmp_path)


def test_a_task_of_the_dag_gives_what_the_command_printed(dag, on_path, detector, tmp_path):
    write_shards(tmp_path / "in", [12])
    scanned = dag["run_sanitize"]("scan", "in", "--detector", str(detector), "--workers", "0", "--threshold", "1e9")
    assert (scanned["out"], scanned["samples"], scanned["failed"]) == ("scanned", 12, [])
    assert dag["run_sanitize"]("verify", scanned["out"])["problems"] == []


def test_a_task_is_not_tried_again_where_that_cannot_help(dag, on_path, detector, tmp_path):
    with pytest.raises(Failed, match="sanitize scan: exit code 2. The log says why"):
        dag["run_sanitize"]("scan", "in", "--detector", "nowhere")
    write_shards(tmp_path / "in", [12])
    (tmp_path / "in" / "part-0001.tar").write_bytes(b"")
    with pytest.raises(RuntimeError, match="exit code 1. The next try does only what is left"):
        dag["run_sanitize"]("scan", "in", "--detector", str(detector), "--workers", "0", "--threshold", "1e9")


def test_the_dag_asks_for_options_that_there_are(dag):
    calls = [line for line in (ROOT / "examples" / "airflow_dag.py").read_text().splitlines() if '"--' in line]
    options = {flag for p in main.commands["scan"].params if isinstance(p, click.Option) for flag in p.opts}
    assert set(re.findall(r'"(--[\w-]+)"', "\n".join(calls))) <= options | {"--json"}
