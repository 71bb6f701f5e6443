"""Options that several commands share, and how YAML, `--set` and options become one command's settings."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml

from sanitize.config import POLICIES
from sanitize.config_loading import from_mapping, load_encoder_spec, load_yaml, overlay
from sanitize.errors import ConfigError, check

CONFIG_FILE = "sanitize.yaml"
T = TypeVar("T")


def common_options(function: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option(
            "--config", default="", help=f"YAML with a section per command [default: {CONFIG_FILE} if it is here]"
        ),
        click.option(
            "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any setting, for example training.epochs=5"
        ),
        click.option(
            "--workers", type=int, help="Ray workers; 0 = this process without Ray [default: what the machine has]"
        ),
        click.option("--gpus-per-worker", type=float, help="[default: 1 if there are GPUs]"),
        click.option(
            "--cpus-per-worker", type=int, help="Threads for decoding and torch [default: what the machine has]"
        ),
        click.option("--batch-size", type=int, help="Images per forward pass [default: 256]"),
        click.option("--address", help="Ray cluster to join, for example auto [default: a local one]"),
        click.option("--image-member", help="Extension of the member to score when a sample has several images"),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def settings_of(section: str, config: str, settings: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
    """Settings of one command: YAML section, then --set, then options. Of policies the last that chooses one decides."""
    path = config or (CONFIG_FILE if Path(CONFIG_FILE).exists() else "")
    file = load_yaml(path) if path else {}
    if unknown := sorted(set(file) - {"fit", "scan", "finetune"}):
        raise ConfigError(
            f"{path}: unknown section {', '.join(map(repr, unknown))}. Known sections: fit, scan, finetune."
        )
    values = file.get(section) or {}
    check(isinstance(values, dict), f"{path}: {section} holds {values!r}, a block of settings was expected.")
    changes = parse_settings(settings), {key: value for key, value in options.items() if value is not None}
    layers = ((path, values), ("--set", changes[0]), ("the options", changes[1]))
    policies = [(where, layer["policy"]) for where, layer in layers if layer.get("policy")]
    for change in changes:
        values = overlay(values, change)
    if policies:
        values["policy"] = resolve_policy(policies)
    for name in ("shards", "validation", "triggered"):
        if isinstance(values.get(name), str):
            values[name] = [values[name]]
    for name in ("encoder", "reference"):
        if isinstance(values.get(name), str):
            values[name] = load_encoder_spec(values[name])
    return values


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """key.inner=value pairs of --set → nested values, read as YAML."""
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        check(bool(equals), f"--set {setting}: write it as key=value, for example --set training.epochs=5.")
        nested: Any = yaml.safe_load(text)
        for key in reversed(name.split(".")):
            nested = {key: nested}
        values = overlay(values, nested)
    return values


def build_config(cls: type[T], values: dict[str, Any], section: str) -> T:
    if not values.get("shards"):
        raise ConfigError(
            f"no shards given. Name a folder: sanitize {section} shards/  (or set {section}.shards in {CONFIG_FILE})."
        )
    return from_mapping(cls, values, f"settings of {section}")


def policy_options(function: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option("--policy", type=click.Choice(POLICIES), help="How the cut is found [default: calibrated]"),
        click.option("--fpr", type=float, help="calibrated, fdr: tolerated rate [default: 0.01]"),
        click.option("--fraction", type=float, help="fraction: share of samples to remove"),
        click.option("--threshold", type=float, help="absolute: remove scores above it"),
        click.option("--mad", type=float, help="robust: median + this many scaled MADs [default: 6]"),
        click.option(
            "--adapt/--no-adapt",
            default=None,
            help="scorers reaction, evidence: adapt to the bulk of this scan [default: adapt]",
        ),
        click.option(
            "--agreement/--no-agreement",
            default=None,
            help="scorer evidence: judge samples also by how they agree with each other [default: where they are like the auxiliary set]",
        ),
        click.option(
            "--keep-unscored", is_flag=True, default=None, help="Keep samples without a score (undecodable, no image)"
        ),
        click.option("--force", is_flag=True, default=None, help="Go on although more than half would be removed"),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def take_policy(options: dict[str, Any]) -> dict[str, Any]:
    """Take the policy's options out, those that were given."""
    values = {name: options.pop(name) for name in ("policy", *OWNERS, "adapt", "agreement", "keep_unscored")}
    return {name: value for name, value in values.items() if value is not None}


OWNERS = {  # a number of a policy → the policies it belongs to
    "fpr": ("calibrated", "fdr"),
    "fraction": ("fraction",),
    "threshold": ("absolute",),
    "mad": ("robust",),
}


def resolve_policy(layers: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The policy of several layers (where, values), the last one strongest. A number without a policy chooses the one it belongs to.

    Raises ConfigError when one layer gives numbers of different policies: one of them would be ignored.
    """
    policy, values = "calibrated", dict[str, Any]()
    for where, layer in layers:
        check(isinstance(layer, dict), f"{where}: policy holds {layer!r}, a block of settings was expected.")
        if layer.get("policy") not in (None, *POLICIES):
            return dict(layer)  # the config says which there are
        numbers = [name for name in OWNERS if name in layer]
        choices = [layer["policy"]] if "policy" in layer else list(POLICIES)
        fitting = [choice for choice in choices if all(choice in OWNERS[name] for name in numbers)]
        if not fitting:
            given = ", ".join([*([f"policy {layer['policy']}"] if "policy" in layer else []), *numbers])
            owners = "; ".join(f"{name} belongs to {' and '.join(OWNERS[name])}" for name in numbers)
            raise ConfigError(f"{where}: {given} do not go together ({owners}). Give one of them.")
        if "policy" in layer or numbers:
            policy = policy if policy in fitting and "policy" not in layer else fitting[0]
        values = {name: value for name, value in (values | layer).items() if policy in OWNERS.get(name, (policy,))}
    return values | {"policy": policy}
