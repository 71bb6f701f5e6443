"""Paths as callers of the library give them, text or `pathlib.Path`; everything behind works with text, for URLs are paths too."""

import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sanitize.errors import ConfigError

AnyPath = str | os.PathLike[str]

if TYPE_CHECKING:  # a field that takes what a caller may give, and gives text

    class PathField:
        def __get__(self, instance: object, owner: Any = None) -> str: ...
        def __set__(self, instance: object, value: AnyPath) -> None: ...

    Paths = tuple[AnyPath, ...] | list[Any]  # type checkers look at no descriptor of a field without a default
else:
    PathField, Paths = str, tuple[str, ...]


def default(value: str) -> Any:
    """Of a PathField."""
    return value


def path_text(path: AnyPath, name: str = "path") -> str:
    """name: what it is, for the message. Raises ConfigError for what is no path, and for a URL that `pathlib` has spoilt."""
    if isinstance(path, str):
        return path
    text = os.fspath(path) if isinstance(path, os.PathLike) else None
    if not isinstance(text, str):
        raise ConfigError(f"{name}: {path!r} is no path. Give a text or a pathlib.Path.")
    if found := re.match(r"([A-Za-z][\w+.-]+):/(?!/)", text):
        url = f"{found[1]}://{text[found.end() :]}"
        raise ConfigError(f"{name}: {path!r}: a pathlib.Path drops a slash of a URL. Give it as text: {url!r}.")
    return text


def path_texts(paths: Iterable[AnyPath], name: str = "paths") -> tuple[str, ...]:
    """Raises ConfigError also for a single path, whose letters would be taken for paths."""
    if isinstance(paths, str | os.PathLike):
        what = "text" if isinstance(paths, str) else "path"
        raise ConfigError(f"{name}: {paths!r} is one {what}, a list of paths was expected. Write ({paths!r},).")
    return tuple(path_text(path, name) for path in paths)


def take_paths(settings: Any, *, one: Iterable[str] = (), several: Iterable[str] = ()) -> None:
    """Make text of the paths in a frozen dataclass, when it is made. one, several: names of its fields."""
    for name in one:
        object.__setattr__(settings, name, path_text(getattr(settings, name), name))
    for name in several:
        object.__setattr__(settings, name, path_texts(getattr(settings, name), name))
