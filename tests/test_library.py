"""`import sanitize` as a library: names, types, silence; and every example and command in the documentation."""

import ast
import dataclasses
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from builders import fit_config, write_encoder, write_shards

import sanitize
from sanitize.cli import main

ROOT = Path(__file__).parents[1]
COMMANDS = [module.removeprefix("commands.") for module in sanitize._HOMES if module.startswith("commands.")]


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.strip()


# ---------------------------------------------------------------- names


def test_import_sanitize_loads_neither_torch_nor_ray():
    loaded = "sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'ray', 'numpy', 'pyarrow', 'yaml'})"
    assert python(f"import sys, sanitize; print({loaded}, 'scan' in dir(sanitize))") == "[] True"


def test_a_command_is_the_function_whatever_was_imported_before():
    names = ", ".join(COMMANDS)
    code = f"""
import sanitize.commands.scan as module
from sanitize.commands.clean import clean, CleanResult
from sanitize import cli, storage, {names}
import sanitize
assert module.scan is sanitize.scan and clean is sanitize.clean and CleanResult is sanitize.CleanResult
print(*(type(getattr(sanitize, name)).__name__ for name in {COMMANDS}), type(cli).__name__)
"""
    assert python(code).split() == ["function"] * len(COMMANDS) + ["module"]


def test_the_names_for_people_type_checkers_and_python_are_the_same():
    body = ast.parse(Path(sanitize.__file__).read_text()).body
    block = next(n for n in body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    typed = {alias.name: n.module for n in block.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert typed == sanitize._HOME
    assert sorted(sanitize.__all__) == sorted(sanitize._HOME)
    for name in sanitize.__all__:
        assert getattr(sanitize, name).__module__ == sanitize._HOME[name]


def test_commands_of_the_library_are_those_of_the_command_line():
    assert set(COMMANDS) - {"list_samples"} == {name.replace("-", "_") for name in main.commands} - {"init", "list"}


def test_a_name_that_is_not_there_says_so():
    with pytest.raises(AttributeError, match=r"module 'sanitize' has no attribute 'scann'"):
        sanitize.scann  # type: ignore[attr-defined]  # noqa: B018


CALLER = """
from pathlib import Path

import sanitize

def clean_up(folder: str, out: Path) -> int:
    config = sanitize.ScanConfig(shards=(folder, Path("more")), out=out)
    print(config.out.upper(), sanitize.verify(out).problems)
    result: sanitize.ScanResult = sanitize.scan(config)
    kept = sanitize.clean("scanned", sanitize.ThresholdPolicy(policy="fdr"))
    for sample in sanitize.KeptSamples("scanned", shuffle=100):
        print(sample["__key__"])
    return result.samples + kept.removed
"""
WRONG = """
sanitize.scan("shards/")
sanitize.ScanConfig(shards=("in",), out=3)
sanitize.scann
"""


@pytest.mark.slow
def test_a_strictly_typed_caller_passes_mypy_and_mistakes_do_not(tmp_path):
    (tmp_path / "caller.py").write_text(CALLER + WRONG)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--cache-dir",
        str(tmp_path / "cache"),
        str(tmp_path / "caller.py"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    first = len(CALLER.splitlines()) + 2
    assert re.findall(r"caller\.py:(\d+): error: .*\[(.*)\]", done.stdout) == [
        (str(first), "arg-type"),
        (str(first + 1), "arg-type"),
        (str(first + 2), "attr-defined"),
    ], done.stdout


# ---------------------------------------------------------------- a good guest


def test_library_calls_print_nothing_and_leave_the_process_as_it_was(
    tmp_path, capfd, scan_config, aux_shards, encoder_spec, detector, monkeypatch
):
    torch.manual_seed(5)
    sanitize.fit(fit_config(aux_shards, encoder_spec, tmp_path / "fitted", cpus_per_worker=2))
    shards = write_shards(tmp_path / "in", [12])
    sanitize.scan(scan_config(shards, policy=sanitize.ThresholdPolicy("fraction", fraction=0.2)))
    sanitize.audit(str(tmp_path / "scanned"))
    assert sanitize.verify(str(tmp_path / "scanned")).problems == ()
    assert torch.initial_seed() == 5
    assert torch.get_num_threads() == 1
    assert capfd.readouterr().out == ""


def test_one_text_in_the_place_of_a_list_of_shards_says_so(scan_config):
    with pytest.raises(sanitize.SanitizeError, match=r"shards: 'in/' is one text.*Write \('in/',\)"):
        sanitize.scan(dataclasses.replace(scan_config(Path("x")), shards="in/"))


# ---------------------------------------------------------------- documentation


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def project(tmp_path_factory, aux_shards) -> Path:
    """A folder as the page assumes it: aux/, shards/, encoder.yaml."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "aux").symlink_to(aux_shards)
    write_shards(folder / "shards", [9, 7, 8, 8])
    write_encoder(folder)
    return folder


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_every_python_example_of_the_library_page_runs(project, monkeypatch, ray_cluster):
    """In the order of the page, each with the names of those before. Airflow is not installed here: its example is last."""
    monkeypatch.chdir(project)
    names: dict = {"__name__": "example"}
    examples = blocks("docs/library.md", "python")
    assert len(examples) >= 5
    for example in examples:
        code = compile(example, "docs/library.md", "exec")
        if "from airflow" not in example:
            exec(code, names)


PAGES = ("README.md", "docs/data.md", "docs/usage.md", "docs/review.md", "docs/library.md", "docs/deployment.md")


def commands(page: str) -> list[list[str]]:
    """Every `sanitize ...` line of the page's shell blocks, comments and line continuations resolved."""
    lines = "\n".join(blocks(page, "(?:bash|sh)?")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines if re.search(r"(^|\s)sanitize [a-z]", line)]
    return [words[words.index("sanitize") + 1 :] for words in found if "sanitize" in words]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_in_the_documentation_exists_with_its_options(page):
    for name, *arguments in commands(page):
        command = main.commands[name]
        options = {flag for p in command.params if isinstance(p, click.Option) for flag in p.opts}
        assert {a.partition("=")[0] for a in arguments if a.startswith("--")} <= options, f"{page}: sanitize {name}"


def test_every_exported_name_is_on_the_library_page():
    page = (ROOT / "docs" / "library.md").read_text()
    assert {name for name in sanitize.__all__ if not re.search(rf"\b{name}\b", page)} == set()


def test_every_public_function_says_what_it_does():
    for name in sanitize.__all__:
        assert inspect.getdoc(getattr(sanitize, name)), name
