"""Strict loading: YAML files and plain values into the dataclasses of `config`, and back."""

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Mapping
from os import PathLike
from typing import Any, TypeVar

import yaml

from sanitize import storage
from sanitize.config import UNSET, EncoderSpec
from sanitize.errors import ConfigError, check
from sanitize.paths import AnyPath, path_text

T = TypeVar("T")
MAX_SETTINGS = 100_000
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # 1e-3: a number, which YAML 1.1 reads as text


class _Loader(yaml.SafeLoader):
    """Aliases may unfold to MAX_SETTINGS values and no more: a few hundred bytes of them can mean gigabytes."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node and _unfolded(node, {}) > MAX_SETTINGS:
            raise yaml.composer.ComposerError(problem=f"its aliases unfold to more than {MAX_SETTINGS} values")
        return node


def _unfolded(node: Any, sizes: dict[int, float]) -> float:
    """Number of nodes with every alias written out; infinite for one that holds itself."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        sizes[id(node)] = 1 + sum(_unfolded(part, sizes) for part in parts)
    return sizes[id(node)]


def load_yaml(path: str) -> dict[str, Any]:
    try:
        value = yaml.load(storage.read_bytes(path), _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())}). Correct that line.") from None
    check(isinstance(value, dict), f"{path}: holds {type(value).__name__}, settings were expected (key: value).")
    return typing.cast(dict[str, Any], value)


def load_encoder_spec(path: AnyPath) -> EncoderSpec:
    """Read an encoder YAML; relative weight files are looked for beside it."""
    path = path_text(path)
    spec = from_mapping(EncoderSpec, load_yaml(path), path)
    folder = path.rsplit("/", 1)[0] if "/" in path else "."

    def beside(name: str) -> str:
        if not name or name.startswith("/") or not storage.is_local(name):
            return name
        return storage.absolute(storage.join(folder, name)) if storage.is_local(path) else storage.join(folder, name)

    family, _, name = spec.architecture.partition(":")
    architecture = spec.architecture
    if family == "exported" or (family == "hf" and (name.count("/") != 1 or storage.exists(beside(name)))):
        architecture = f"{family}:{beside(name)}"  # else a name of the hub, owner/model
    tokenizer = spec.tokenizer if spec.tokenizer == "open_clip" else beside(spec.tokenizer)
    return dataclasses.replace(spec, architecture=architecture, weights=beside(spec.weights), tokenizer=tokenizer)


def with_absolute_paths(spec: EncoderSpec) -> EncoderSpec:
    """With absolute paths: a worker or a later command may start in another folder."""
    family, _, name = spec.architecture.partition(":")
    changes: dict[str, Any] = (
        {"architecture": f"hf:{storage.absolute(name)}"} if family == "hf" and storage.exists(name) else {}
    )
    if spec.tokenizer not in ("", "open_clip"):
        changes["tokenizer"] = storage.absolute(spec.tokenizer)
    if spec.weights:
        changes["weights"] = storage.absolute(spec.weights)
    return dataclasses.replace(spec, **changes)


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """A config dataclass from plain values. Unknown keys and wrong types are errors that name the key."""
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(fields)):
        raise ConfigError(f"{where}: unknown key {', '.join(map(repr, unknown))}. Known keys: {', '.join(fields)}.")
    hints = _hints(cls)  # type: ignore[arg-type]
    converted = {name: _convert(hints[name], value, f"{where}: {name}") for name, value in values.items()}
    missing = [
        name
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    check(not missing, f"{where}: missing {', '.join(missing)}.")
    try:
        return cls(**converted)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(option for option in hint.__args__ if option is not type(None))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        check(isinstance(value, dict), f"{where} holds {value!r}, a block of settings was expected.")
        return from_mapping(hint, value, where)
    if typing.get_origin(hint) is dict:
        check(isinstance(value, dict), f"{where} holds {value!r}, a block of settings was expected.")
        inner = typing.get_args(hint)[1]
        return value if inner is Any else {key: _convert(inner, item, f"{where}.{key}") for key, item in value.items()}
    if typing.get_origin(hint) is tuple:
        check(isinstance(value, list | tuple), f"{where} holds {value!r}, a list was expected.")
        return tuple(_convert(typing.get_args(hint)[0], item, where) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # effort: 0.05
    if hint is str and isinstance(value, PathLike):
        return path_text(value, where)
    right = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    check(right, f"{where} holds {value!r}, {hint.__name__} was expected.")
    return value


def to_mapping(config: Any) -> dict[str, Any]:
    """The plain values of a config at any depth, as JSON and YAML hold them."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            values = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
            return {
                f.name: plain(inner) for f, inner in values if UNSET not in f.metadata or inner != f.metadata[UNSET]
            }
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return typing.cast(dict[str, Any], plain(config))


def overlay(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, blocks merged key by key; neither is changed."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = overlay(merged[key], value) if both else value
    return merged
