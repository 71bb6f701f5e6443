"""A folder belongs to one run: what it was made from is remembered in it, and another run is refused."""

import importlib.metadata
import json
import platform
from typing import Any

import sanitize
from sanitize import storage
from sanitize.errors import RefusedError


def refuse_other_run(folder: str, name: str, identity: dict[str, Any], what: str) -> bool:
    """Whether `folder`/`name` remembers this very run already. Raises RefusedError when it remembers another one.

    identity: what makes the run this run (plain values); keys that only one of the two has do not matter, so the file of an older
    version stays valid when a setting leaves or joins the identity. what: the folder's content in words, with an article.
    """
    storage.remove_partials(folder)
    path = storage.join(folder, name)
    if not storage.exists(path):
        return False
    before = storage.read_json(path)
    now = json.loads(json.dumps(identity))
    if changed := sorted(key for key in now if key in before and now[key] != before[key]):
        raise RefusedError(
            f"{folder}: holds {what} that differs in {', '.join(changed)}. Give another --out, or delete the folder to start again."
        )
    return True


def claim_folder(folder: str, name: str, identity: dict[str, Any], what: str) -> None:
    """Make `folder` this run's, or check that it is. Raises RefusedError when it is another's."""
    if not refuse_other_run(folder, name, identity, what):
        storage.write_json(storage.join(folder, name), identity)


def library_versions() -> dict[str, str]:
    names = ("torch", "torchvision", "pillow", "pyarrow", "ray")
    versions = {name: importlib.metadata.version(name) for name in names}
    return versions | {"sanitize": sanitize.__version__, "python": platform.python_version()}
