"""A folder belongs to one run: what it was made from is remembered in it, and another run is refused."""

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from typing import Any

import sanitize
from sanitize import storage
from sanitize.errors import RefusedError


def refuse_other_run(
    folder: str, name: str, identity: dict[str, Any], what: str, inputs: Sequence[str] = (), notes: Sequence[str] = ()
) -> bool:
    """Whether `folder`/`name` remembers this very run already. Raises RefusedError when it remembers another one.

    identity: what makes the run this run (plain values); keys that only the file has do not matter, so the file of an older version
    stays valid when a setting leaves the identity. what: the folder's content in words, with an article.
    inputs: keys of `identity` that hold shards by stem; "" or 0 in one = it could not be read, and is not compared; once it can be,
    it is added. An older file may lack them. notes: keys that are remembered and not compared.
    """
    storage.remove_partials(folder)
    path = storage.join(folder, name)
    if not storage.exists(path):
        return False
    recorded, now = storage.read_json(path), json.loads(json.dumps(identity))
    before = dict(recorded)
    for key in set(inputs) & recorded.keys():
        now[key], before[key] = _known(now[key], recorded[key]), _known(recorded[key], now[key])
    compared = [key for key in now if key not in notes and (key in before or key not in inputs)]
    if changed := sorted(key for key in compared if now[key] != before.get(key)):
        raise RefusedError(
            f"{folder}: holds {what} that differs in {', '.join(changed)}. Give another --out, or delete the folder to start again."
        )
    if before != recorded:
        storage.write_json(path, before)
    return True


def _known(value: Any, other: Any) -> Any:
    """`value`, and from `other` what is missing in it ("" or 0), at any depth."""
    if isinstance(value, dict) and isinstance(other, dict):
        return {name: _known(inner, other.get(name)) for name, inner in value.items()}
    return value or other or value


def claim_folder(
    folder: str, name: str, identity: dict[str, Any], what: str, inputs: Sequence[str] = (), notes: Sequence[str] = ()
) -> None:
    """Make `folder` this run's, or check that it is. Raises RefusedError when it is another's."""
    if not refuse_other_run(folder, name, identity, what, inputs, notes):
        storage.write_json(storage.join(folder, name), identity)


def remove_scaffolding(folder: str) -> None:
    """What only served to get to the result; a kill may have left it beside that."""
    for name in ("cache", "training"):
        storage.remove_folder(storage.join(folder, name))


def library_versions() -> dict[str, str]:
    names = ("torch", "torchvision", "pillow", "simplejpeg", "pyarrow", "ray")
    versions = {name: importlib.metadata.version(name) for name in names}
    return versions | {"sanitize": sanitize.__version__, "python": platform.python_version()}
