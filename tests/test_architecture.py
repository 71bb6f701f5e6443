"""Imports point one way, every config loads, and the tree holds no leftovers."""

import ast
from pathlib import Path

import pytest

from pipelines.benchmark import BenchmarkConfig
from pipelines.clean_then_finetune import PipelineConfig
from pipelines.red_team import load_config
from pipelines.training_study import ScenarioConfig, StudyConfig
from sanitize.config import from_mapping, load_yaml

ROOT = Path(__file__).parents[1]
LAYERS = [  # a module may import from its own row and the rows above it
    {"errors", "records"},
    {"storage", "config"},
    {"stages"},
    {"progress", "metrics", "preview", "attacks", "detectors", "dataset"},
    {"runtime", "checkpoint", "ranks", "embedding", "training", "learning", "objectives", "material", "trained"},
    {"judge"},
    {"fit", "clean", "poison", "verify", "inspect", "finetune"},
    {"scan", "audit"},
    {"cli"},
]
MODULES = sorted((ROOT / "sanitize").rglob("*.py"))


def layer(name: str) -> int:
    return next(number for number, row in enumerate(LAYERS) if name in row)


def imported(path: Path) -> set[str]:
    """Names of sanitize's own modules that a file imports, first level only."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sanitize":
            parts = node.module.split(".")
            names |= (
                {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names if not alias.name.startswith("_")}
            )
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = path.relative_to(ROOT / "sanitize").parts[0].removesuffix(".py")
    if own == "__init__":
        return
    wrong = {name for name in imported(path) if layer(name) > layer(own)}
    assert wrong == set()


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_commands_touch_ray_and_only_when_needed(path):
    top_level = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
    modules = {alias.name.split(".")[0] for n in top_level if isinstance(n, ast.Import) for alias in n.names}
    modules |= {n.module.split(".")[0] for n in top_level if isinstance(n, ast.ImportFrom) and n.module}
    assert "ray" not in modules
    if "ray" in path.read_text().replace("array", "").replace("gray", "") and "import ray" in path.read_text():
        assert path.name in ("runtime.py", "ranks.py")


def test_commands_of_the_product_never_import_attacks():
    for name in (
        "fit",
        "scan",
        "clean",
        "finetune",
        "training",
        "learning",
        "objectives",
        "material",
        "trained",
        "runtime",
    ):
        assert "attacks" not in imported(ROOT / "sanitize" / f"{name}.py")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_loads(path):
    values = load_yaml(str(path))
    if "train" in values:
        assert from_mapping(PipelineConfig, values, path.name).finetune
    elif "scenarios" in values:
        for name, scenario in from_mapping(StudyConfig, values, path.name).scenarios.items():
            assert from_mapping(ScenarioConfig, scenario, name).pipeline
    elif "attack" in values:
        for preset in values["presets"]:
            assert load_config(str(path), preset).attack == values["attack"]
    else:
        assert from_mapping(BenchmarkConfig, values, path.name).victims
