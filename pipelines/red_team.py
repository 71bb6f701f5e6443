"""The zoo of victims: make the encoders that the configs describe, backdoor them, measure the attacks.

    python -m pipelines.red_team configs/red_team_*.yaml [--preset cpu|gpu] [--seed 100 --seed 101]

Every victim gets a folder: clean/ and backdoored/ (encoder.yaml, encoder.safetensors), report.json (evaluation), truth.json
(what was poisoned, the trigger, every setting, the number format it was trained in). A victim whose settings, data and
seed are those of a finished folder is not made again, so running the same command after an interruption makes the rest.
Clean encoders are shared.
"""

import csv
import dataclasses
import io
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from pipelines import clip_victim, page, photo_victim, ssl_victim
from pipelines.command_line import command_line
from sanitize import storage
from sanitize.attacks import optimised_trigger
from sanitize.attacks.evaluation import AttackReport
from sanitize.attacks.triggers import FileTrigger, Trigger, make_trigger
from sanitize.config_loading import from_mapping, load_yaml, overlay, to_mapping
from sanitize.errors import check
from sanitize.stages.precision import resolve_precision

log = logging.getLogger(__name__)
RECIPE = 1  # raise it when the same settings make another victim
Build = Callable[[Any, str, str, torch.device], tuple[AttackReport, dict[str, Any]]]


@dataclass(frozen=True)
class AttackFamily:
    """How a family of attacks is configured and made."""

    config: type[Any]
    inputs: Callable[[Any], dict[str, list[str]]]
    build: Build


def _on_encoder(config: type[ssl_victim.SslConfig]) -> AttackFamily:
    return AttackFamily(config, ssl_victim.inputs, ssl_victim.build)


_SSL = _on_encoder(ssl_victim.SslConfig)
_CLIP = AttackFamily(clip_victim.ClipConfig, clip_victim.inputs, clip_victim.build)
_ALIGNED = AttackFamily(clip_victim.AlignedClipConfig, clip_victim.inputs, clip_victim.build)
_PHOTOS = AttackFamily(photo_victim.PhotoConfig, photo_victim.inputs, photo_victim.build)
ATTACKS = {
    "badencoder": _SSL,
    "drupe": _SSL,
    "ctrl": _SSL,
    "adaptive": _SSL,
    "evade": _on_encoder(ssl_victim.EvadeVictimConfig),
    "predictive": _on_encoder(ssl_victim.PredictiveVictimConfig),
    "informed": _on_encoder(ssl_victim.InformedVictimConfig),
    "inactive": _on_encoder(ssl_victim.InactiveVictimConfig),
    "composite": _on_encoder(ssl_victim.CompositeVictimConfig),
    "clip_text": _CLIP,
    "badclip": _CLIP,
    "badclip_aligned": _ALIGNED,
    "photos": _PHOTOS,
}
PRESETS = ("cpu", "gpu")


@dataclass(frozen=True)
class VictimRow:
    """One line of red_team.csv."""

    attack: str  # the YAML's name without red_team_
    preset: str
    seed: int
    clean_accuracy: float
    backdoored_accuracy: float
    asr: float
    asr_clean_encoder: float
    cos_triggered: float
    seconds: int


def load_config(path: str, preset: str, settings: Mapping[str, Any] | None = None) -> Any:
    """Shared settings of the YAML, overlaid with its section `presets.<preset>`, then with `settings`."""
    values = load_yaml(path)
    presets = values.pop("presets", {})
    check(preset in presets, f"{path}: no preset {preset!r}. It has: {', '.join(presets) or 'none'}.")
    attack = values.get("attack")
    check(attack in ATTACKS, f"{path}: attack: {attack!r} is not one of {', '.join(ATTACKS)}.")
    values = overlay(overlay(values, presets[preset]), settings or {})
    return from_mapping(ATTACKS[str(attack)].config, values, f"{path} (preset {preset})")


def make(
    path: str,
    preset: str,
    zoo: str,
    seed: int | None = None,
    out: str = "",
    settings: Mapping[str, Any] | None = None,
) -> tuple[str, VictimRow]:
    """The victim's folder and its line: from a finished folder, or made now."""
    config = load_config(path, preset, settings)
    config = config if seed is None else dataclasses.replace(config, seed=seed)
    kind = ATTACKS[config.attack]
    settings = {"recipe": RECIPE, "config": to_mapping(config), "inputs": kind.inputs(config)}
    digest = storage.json_sha256(settings)
    name = Path(path).stem.removeprefix("red_team_")
    folder = out or storage.join(zoo, f"{name}-{preset}-{digest[:8]}")
    report = storage.join(folder, "report.json")
    if not (storage.exists(report) and storage.read_json(report).get("settings_sha256") == digest):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        result, truth = kind.build(config, folder, zoo, device)
        seconds = truth.pop("seconds")
        precision = str(resolve_precision("auto", device)).removeprefix("torch.")
        storage.write_json(storage.join(folder, "truth.json"), settings | {"precision": precision} | truth)
        values = {"settings_sha256": digest, "seed": config.seed, "seconds": seconds} | dataclasses.asdict(result)
        storage.write_json(report, values)
    else:
        log.info("%s is finished", folder)
    values = {"attack": name, "preset": preset} | storage.read_json(report)
    return folder, VictimRow(**{f.name: values[f.name] for f in dataclasses.fields(VictimRow)})


def merged(rows: Sequence[VictimRow], path: str) -> list[VictimRow]:
    """The rows of an earlier table with `rows` in place of those of the same attack, preset and seed; sorted."""
    table = {(row.attack, PRESETS.index(row.preset), row.seed): row for row in [*read_table(path), *rows]}
    return [table[key] for key in sorted(table)]


def read_table(path: str) -> list[VictimRow]:
    if not storage.exists(path):
        return []
    with io.StringIO(storage.read_bytes(path).decode()) as text:
        kinds = {f.name: f.type for f in dataclasses.fields(VictimRow)}
        return [VictimRow(**{k: kinds[k](v) for k, v in line.items()}) for line in csv.DictReader(text)]  # type: ignore[operator]


def target_class(settings: Mapping[str, Any]) -> int:
    """Number of the target class in the config that truth.json keeps; a CLIP's target is a class name."""
    target = settings["target"]
    return settings["data"]["classes"].index(target) if isinstance(target, str) else int(target)


def trigger_of(folder: str, settings: Mapping[str, Any]) -> Trigger:
    """Of a victim: the one that its attacker optimised, else from the config that its truth.json keeps; a file that lies in its folder
    is found wherever that is."""
    if storage.exists(optimised := storage.join(folder, optimised_trigger.FILE)):
        return FileTrigger(optimised)
    values = dict(settings.get("trigger") or {"name": "image", "path": "trigger.png"})
    if "path" in values and storage.exists(own := storage.join(folder, values["path"])):
        values["path"] = own
    return make_trigger(values)


def markdown(rows: Sequence[VictimRow]) -> str:
    header = [
        "attack",
        "preset",
        "seed",
        "clean accuracy",
        "backdoored accuracy",
        "attack success",
        "same trigger, clean encoder",
        "cosine among triggered",
        "seconds",
    ]
    cells = [[f"{v:.3f}" if isinstance(v, float) else v for v in dataclasses.astuple(row)] for row in rows]
    return page.table(header, cells)


LABELS = {
    "clean_accuracy": "clean accuracy (clean encoder, clean images)",
    "backdoored_accuracy": "backdoored accuracy (backdoored encoder, clean images)",
    "asr": "attack success (backdoored encoder, triggered images)",
    "asr_clean_encoder": "the same trigger on the clean encoder",
    "cos_triggered": "mean cosine among triggered embeddings",
    "cos_clean": "mean cosine among clean embeddings",
    "distance_triggered": "distance of triggered from clean embeddings (SWD / D)",
    "norm_triggered": "mean raw norm, triggered images",
    "norm_triggered_std": "  its standard deviation",
    "norm_clean": "mean raw norm, clean images",
    "norm_clean_std": "  its standard deviation",
    "norm_clean_encoder": "mean raw norm, clean images, clean encoder",
}


def evaluation_table(folder: str) -> str:
    values = storage.read_json(storage.join(folder, "report.json"))
    return "\n".join(f"  {label:56s} {values[name]:8.3f}" for name, label in LABELS.items())


@click.command()
@click.argument("configs", nargs=-1, required=True, type=click.Path(exists=True))
@click.option("--preset", default="cpu", show_default=True, help="Section of `presets` in the YAML: cpu or gpu.")
@click.option("--seed", "seeds", type=int, multiple=True, help="Instead of the YAML's; may be given several times.")
@click.option("--zoo", default="runs/zoo", show_default=True, help="Folder of all victims and their clean encoders.")
@click.option("--out", default="", help="The victim's own folder, when CONFIGS is one file.")
@click.option("--results", default="", help="CSV to update [default: <zoo>/red_team.csv]")
@click.option("--page", "markdown_page", default="", help="Markdown page whose table is written anew from the CSV.")
def main(
    configs: tuple[str, ...], preset: str, seeds: tuple[int, ...], zoo: str, out: str, results: str, markdown_page: str
) -> None:
    """Make the victims that CONFIGS describe and measure the attacks; finished ones are reused."""
    with command_line():
        check(preset in PRESETS, f"--preset {preset}: use one of {', '.join(PRESETS)}.")
        wanted = [(config, seed) for config in configs for seed in (seeds or (None,))]
        check(not out or len(wanted) == 1, "--out: is for one config and one seed; use --zoo for more.")
        results = results or storage.join(zoo, "red_team.csv")
        start = time.monotonic()
        for number, (config, seed) in enumerate(wanted, 1):
            click.echo(f"[{number}/{len(wanted)}, {time.monotonic() - start:.0f} s] {config}", err=True)
            folder, row = make(config, preset, zoo.rstrip("/"), seed, out.rstrip("/"))
            click.echo(f"{folder}\n{evaluation_table(folder)}")
            page.write_csv(results, [dataclasses.asdict(line) for line in merged([row], results)])
            if markdown_page:
                page.replace(markdown_page, "red_team.csv", markdown(read_table(results)))


if __name__ == "__main__":
    main()
