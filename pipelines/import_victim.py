"""Somebody's published checkpoints as a victim of ours, so that the benchmark can scan it.

    python -m pipelines.import_victim backdoored.pth --format badencoder --clean clean.pth
        --trigger '{name: file, path: trigger_10.npz}' --target 0 --out runs/imported/badencoder
        [--train runs/shards/cifar10-train-000000.tar --test runs/shards/cifar10-test-000000.tar] [--encoder encoder.yaml]

The folder gets clean/ and backdoored/ (encoder.yaml, encoder.safetensors), the trigger's file, truth.json and, with labelled shards to
train and test a head on, report.json. Name it in a benchmark: `victims: {theirs: {folder: runs/imported/badencoder, ...}}`.
Nothing in a checkpoint is executed: it loads as plain tensors, every one of which must fit, or is refused.
"""

import dataclasses
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import yaml

from pipelines import red_team
from pipelines.command_line import command_line
from pipelines.data import load_images
from pipelines.ssl_victim import head_outputs
from sanitize import runtime, storage
from sanitize.artifacts.encoder_folder import save_encoder
from sanitize.attacks import evaluation
from sanitize.attacks.evaluation import HeadConfig
from sanitize.attacks.triggers import make_trigger
from sanitize.config import EncoderSpec
from sanitize.config_loading import load_encoder_spec, to_mapping
from sanitize.errors import ConfigError, check
from sanitize.stages.encoders import Encoder, load_encoder

log = logging.getLogger(__name__)
_CIFAR = EncoderSpec("resnet18-cifar", "", 32, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# What the published checkpoints of each are, unless --encoder says otherwise; their layouts are told apart by stages/weights.py.
FORMATS = {
    "badencoder": _CIFAR,
    "drupe": _CIFAR,
    "ctrl": dataclasses.replace(_CIFAR, mean=(0, 0, 0), std=(1, 1, 1)),  # the published code normalises nothing
    "clip": EncoderSpec("clip", "", 224, _CLIP_MEAN, _CLIP_STD),
}


def import_victim(
    checkpoint: str, clean: str, kind: str, trigger: Mapping[str, Any], target: int, out: str, spec: EncoderSpec
) -> None:
    """Write clean/, backdoored/, the trigger's file and truth.json into `out`. kind: one of FORMATS, by which truth.json calls it."""
    truth = storage.join(out, "truth.json")
    check(not storage.exists(truth), f"{out}: holds a victim already. Delete it, or choose another --out.")
    check(target >= 0, f"--target {target}: give the number of the class that the trigger aims at, from 0 on.")
    make_trigger(trigger)  # its settings are checked before anything is written
    encoders = {"clean": load(clean, spec), "backdoored": load(checkpoint, spec)}
    same = encoders["clean"].fingerprint() == encoders["backdoored"].fingerprint()
    check(not same, f"{checkpoint} and --clean {clean}: are the same encoder. Give the one before the attack, too.")
    for name, encoder in encoders.items():
        save_encoder(encoder, storage.join(out, name))
    settings = {"attack": kind, "trigger": with_file(trigger, out), "target": target, "encoder": to_mapping(spec)}
    given = {name: storage.file_sha256(path) for name, path in (("clean", clean), ("backdoored", checkpoint))}
    storage.write_json(truth, {"config": settings, "imported": given})


def load(checkpoint: str, spec: EncoderSpec) -> Encoder:
    return load_encoder(dataclasses.replace(spec, weights=checkpoint))


def with_file(trigger: Mapping[str, Any], out: str) -> dict[str, Any]:
    """The trigger's settings; the file that it reads is copied to `out`, and named there without its folder."""
    if "path" not in trigger:
        return dict(trigger)
    name = f"trigger{Path(trigger['path']).suffix}"
    storage.write_bytes(storage.join(out, name), storage.read_bytes(trigger["path"]))
    return {**trigger, "path": name}


def measure(out: str, train: tuple[str, ...], test: tuple[str, ...], seed: int = 100) -> None:
    """Did the attack work? Heads on both encoders, trained and tested on labelled shards → report.json, as of victims made here."""
    start = time.monotonic()
    settings = storage.read_json(storage.join(out, "truth.json"))["config"]
    trigger, target, outputs = red_team.trigger_of(out, settings), settings["target"], {}
    for kind in ("clean", "backdoored"):
        encoder = load_encoder(load_encoder_spec(storage.join(out, kind, "encoder.yaml"))).to(runtime.device())
        known, unseen = (load_images(shards, 0, encoder.spec.image_size) for shards in (train, test))
        classes = int(max(known.labels.max(), unseen.labels.max())) + 1
        check(target < classes, f"--target {target}: the labels of --train and --test are 0 to {classes - 1}.")
        outputs[kind] = head_outputs(encoder, known, unseen, trigger, classes, HeadConfig(), seed)
    found = evaluation.report(outputs["clean"], outputs["backdoored"], unseen.labels, target)
    values = {"seed": seed, "seconds": round(time.monotonic() - start)} | dataclasses.asdict(found)
    storage.write_json(storage.join(out, "report.json"), values)


def parse_trigger(text: str) -> dict[str, Any]:
    """A name, or a YAML mapping of a name and settings."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        values = None
    values = {"name": values} if isinstance(values, str) else values
    if not isinstance(values, dict) or "name" not in values:
        raise ConfigError(f"--trigger {text}: give a name (patch) or '{{name: patch, side: 10}}' with its settings.")
    return values


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True))
@click.option("--format", "kind", type=click.Choice(list(FORMATS)), required=True, help="Whose checkpoint it is.")
@click.option(
    "--clean", type=click.Path(exists=True), required=True, help="The encoder before the attack: the control."
)
@click.option(
    "--trigger", required=True, help="A name, or '{name: file, path: trigger.npz}' (docs/usage.md, Triggers)."
)
@click.option("--target", type=int, required=True, help="Class index that the trigger aims at.")
@click.option("--out", required=True, help="The victim's folder.")
@click.option("--encoder", help="encoder.yaml: architecture and preprocessing, where not the published ones.")
@click.option("--train", multiple=True, help="Labelled shards to train heads on; with --test, the attack is measured.")
@click.option("--test", multiple=True, help="Labelled shards to measure attack success on.")
def main(
    checkpoint: str,
    kind: str,
    clean: str,
    trigger: str,
    target: int,
    out: str,
    encoder: str | None,
    train: tuple[str, ...],
    test: tuple[str, ...],
) -> None:
    """Turn CHECKPOINT, a backdoored encoder that somebody published, into a victim folder."""
    with command_line():
        check(bool(train) == bool(test), "--train and --test: give both, or none.")
        out = out.rstrip("/")
        spec = load_encoder_spec(encoder) if encoder else FORMATS[kind]
        import_victim(checkpoint, clean, kind, parse_trigger(trigger), target, out, spec)
        if train:
            measure(out, train, test)
            click.echo(red_team.evaluation_table(out))
        else:
            log.warning("%s: whether the attack works is not known. Give --train and --test, labelled shards.", out)
        click.echo(out)


if __name__ == "__main__":
    main()
