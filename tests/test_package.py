"""What is published: a name of our own, a wheel with nothing but `sanitize`, and hints that install what they say."""

import email
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import sanitize

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TEXTS = [
    path
    for pattern in ("*.md", "docs/*.md", "docs/**/*.md", "sanitize/**/*.py", "tests/*.py", "examples/*", "Dockerfile")
    for path in ROOT.glob(pattern)
    if path.is_file()
]


def test_every_hint_to_install_an_extra_names_our_distribution_and_an_extra_that_it_has():
    texts = [path.read_text() for path in TEXTS]
    hints = [hint for text in texts for hint in re.findall(r"'(sanitize[-\w]*)\[([\w,]+)\]'", text)]
    assert ("sanitize-shards", "clip") in hints
    assert {name for name, _ in hints} == {PROJECT["name"]}
    assert {extra for _, extras in hints for extra in extras.split(",")} <= set(PROJECT["optional-dependencies"])


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    source = tmp_path / "source"
    pages = [path for path in ROOT.glob("sanitize/pages/*") if path.is_file()]
    for path in [
        *ROOT.glob("sanitize/**/*.py"),
        *pages,
        *(ROOT / n for n in ("pyproject.toml", "README.md", "LICENSE")),
    ]:
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (source / "sanitize" / "py.typed").touch()
    subprocess.run([*command, str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        meta = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
        described = email.message_from_bytes(archive.read(f"{meta}/METADATA"))
        commands = archive.read(f"{meta}/entry_points.txt").decode()
    assert {name.partition("/")[0] for name in names} == {"sanitize", meta}
    assert {"sanitize/py.typed", *(f"sanitize/pages/{path.name}" for path in pages)} <= set(names)
    assert (described["Name"], described["Version"]) == (PROJECT["name"], sanitize.__version__)
    assert "sanitize = sanitize.cli:main" in commands
