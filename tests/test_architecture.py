"""Imports point one way (contracts in pyproject.toml), every config loads, modules stay small."""

import ast
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.audit_study import AuditStudyConfig
from pipelines.benchmark_config import BenchmarkConfig
from pipelines.clean_then_finetune import PipelineConfig
from pipelines.red_team import load_config
from pipelines.training_study import StudyConfig
from sanitize import config
from sanitize.config_loading import from_mapping, load_yaml
from sanitize.stages import scoring

ROOT = Path(__file__).parents[1]
MODULES = sorted(path for folder in ("sanitize", "pipelines") for path in (ROOT / folder).rglob("*.py"))
TESTED = [*MODULES, *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests").glob("*.py")]


# ---------------------------------------------------------------- imports


def lint_imports(folder: Path) -> tuple[int, str]:
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([program, "--no-cache"], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_imports_keep_the_contracts():
    code, output = lint_imports(ROOT)
    assert code == 0, output


LAYERS, INDEPENDENT = "Imports point one way", "Commands do not know each other"
PLANTED = {  # module → a line that breaks the contract of that name
    "a stage that knows a command": ("stages/images.py", "from sanitize.commands import scan", LAYERS),
    "the same, lazily": ("stages/images.py", "def f():\n    import sanitize.commands.scan", LAYERS),
    "the same, relatively": ("stages/images.py", "from ..commands import scan", LAYERS),
    "a product that knows an experiment": ("plots.py", "import pipelines.data", LAYERS),
    "storage that knows a stage": ("storage.py", "import sanitize.stages.images", LAYERS),
    "two commands": ("commands/audit.py", "from sanitize.commands.verify import verify", INDEPENDENT),
    "clean that knows scan": ("commands/clean.py", "import sanitize.commands.scan", INDEPENDENT),
    "fit that knows attacks": (
        "commands/fit.py",
        "from sanitize.attacks import triggers",
        "neither attacks nor baselines",
    ),
    "scan that knows a baseline": (
        "commands/scan.py",
        "import sanitize.detectors.norm",
        "neither attacks nor baselines",
    ),
    "verify that loads a model": ("commands/verify.py", "import sanitize.stages.encoders", "verify needs no model"),
    "a stage that knows Ray": (
        "stages/prefetch.py",
        "def f():\n    import ray",
        "Only runtime, counters, workers and training.distributed",
    ),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_violation_is_found(case, tmp_path):
    module, line, contract = PLANTED[case]
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for folder in ("sanitize", "pipelines"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "sanitize" / module).open("a") as file:
        file.write(f"\n{line}\n")
    code, output = lint_imports(tmp_path)
    assert code == 1, output
    assert any(contract in found and "BROKEN" in found for found in output.splitlines()), output


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_ray_is_loaded_only_when_it_is_needed(path):
    top_level = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
    modules = {alias.name.split(".")[0] for n in top_level if isinstance(n, ast.Import) for alias in n.names}
    modules |= {n.module.split(".")[0] for n in top_level if isinstance(n, ast.ImportFrom) and n.module}
    assert "ray" not in modules


# ---------------------------------------------------------------- size


@pytest.mark.parametrize("path", TESTED, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_fits_a_reader(path):
    lines = path.read_text().count("\n")
    assert lines <= 350, f"{lines} lines: look for a second idea in it"


def test_functions_are_short():
    nodes = [node for path in MODULES for node in ast.walk(ast.parse(path.read_text()))]
    lengths = [
        node.end_lineno - node.lineno + 1 for node in nodes if isinstance(node, ast.FunctionDef) and node.end_lineno
    ]
    assert statistics.median(lengths) <= 12


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_loads(path):
    values = load_yaml(str(path))
    if "train" in values:
        assert from_mapping(PipelineConfig, values, path.name).finetune
    elif "scenarios" in values:
        assert from_mapping(StudyConfig, values, path.name).scenarios
    elif "rate" in values and "victims" in values:
        assert from_mapping(AuditStudyConfig, values, path.name).victims
    elif "attack" in values:
        for preset in values["presets"]:
            assert load_config(str(path), preset).attack == values["attack"]
    else:
        assert from_mapping(BenchmarkConfig, values, path.name).victims


def test_the_settings_name_the_scorers_that_there_are():
    assert set(config.SCORERS) == set(scoring.SCORERS)


def test_parquet_is_read_in_one_place():
    """By threads of Arrow's own a process that ends soon after is aborted now and then; see sanitize/parquet.py."""
    readers = [
        path for path in MODULES if re.search(r"pq\.read_table|ParquetDataset|pyarrow\.dataset", path.read_text())
    ]
    assert readers == []
