"""Make a victim: pre-train an encoder, backdoor it, measure the attack.

    python -m pipelines.red_team configs/red_team_badencoder_cifar10.yaml [--preset cpu|gpu]

Writes <out>/clean/encoder.{yaml,safetensors}, <out>/backdoored/..., <out>/report.json. A finished pre-training is reused.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click
import safetensors.torch
import torch
import yaml
from torch import Tensor

from sanitize import storage
from sanitize.attacks import badencoder, evaluation, simclr
from sanitize.attacks.badencoder import BadEncoderConfig
from sanitize.attacks.evaluation import AttackReport, Features, HeadConfig
from sanitize.attacks.simclr import SimclrConfig
from sanitize.attacks.triggers import PatchTrigger
from sanitize.config import EncoderSpec, check, from_mapping, load_yaml, overlay, to_mapping
from sanitize.errors import ConfigError, SanitizeError
from sanitize.stages import images
from sanitize.stages.encoders import Encoder, load_encoder
from sanitize.stages.shards import ShardReader, list_shards

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataConfig:
    """Shards with `.cls` labels (class index as text). Numbers of images, 0 = all."""

    pretrain: tuple[str, ...]
    shadow_images: int
    train: tuple[str, ...]
    test: tuple[str, ...]
    train_images: int = 0
    test_images: int = 0


@dataclass(frozen=True)
class RedTeamConfig:
    """One victim."""

    out: str
    data: DataConfig
    encoder: EncoderSpec
    classes: int = 10
    target: int = 9
    trigger: PatchTrigger = field(default_factory=PatchTrigger)
    simclr: SimclrConfig = field(default_factory=SimclrConfig)
    badencoder: BadEncoderConfig = field(default_factory=BadEncoderConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    seed: int = 100


@dataclass(frozen=True)
class LabelledImages:
    pixels: Tensor  # (N, 3, S, S) uint8
    labels: Tensor  # (N,) int64


def load_config(path: str, preset: str) -> RedTeamConfig:
    """Shared settings of the YAML, overlaid with its section `presets.<preset>`."""
    values = load_yaml(path)
    presets = values.pop("presets", {})
    check(preset in presets, f"{path}: no preset {preset!r}. It has: {', '.join(presets) or 'none'}.")
    return from_mapping(RedTeamConfig, overlay(values, presets[preset]), f"{path} (preset {preset})")


def load_images(patterns: tuple[str, ...], limit: int, size: int, *, labelled: bool = True) -> LabelledImages:
    """Decoded images at the encoder's size, with the class index of the `.cls` member (-1 when not asked for)."""
    pixels, labels = [], []
    for shard in list_shards(patterns):
        with storage.open_read(shard.url) as file, storage.open_read(shard.url) as labels_file:
            for sample in ShardReader(file, shard).samples():
                picture = images.decode_sample(sample)
                if picture.pixels is None:
                    raise ConfigError(
                        f"{shard.url}: {sample.key}: {picture.reason}. Use clean shards to make a victim."
                    )
                batch = images.to_batch([picture.pixels], size, "squash", torch.device("cpu"))
                pixels.append((batch[0] * 255).round().to(torch.uint8))
                member = next((m for m in sample.members if m.extension == "cls"), None)
                check(
                    not labelled or member is not None, f"{shard.url}: {sample.key} has no .cls member (class index)."
                )
                if member is not None:
                    labels_file.seek(member.data)
                    labels.append(int(labels_file.read(member.size)))
                if len(pixels) == limit:
                    return LabelledImages(torch.stack(pixels), torch.tensor(labels))
    return LabelledImages(torch.stack(pixels), torch.tensor(labels))


def run(config: RedTeamConfig) -> AttackReport:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = config.encoder.image_size
    start = time.monotonic()
    pretrain = load_images(config.data.pretrain, 0, size, labelled=False).pixels
    clean = pretrained(config, pretrain, device)
    splits = {
        "train": load_images(config.data.train, config.data.train_images, size),
        "test": load_images(config.data.test, config.data.test_images, size),
    }
    splits["triggered"] = LabelledImages(config.trigger(splits["test"].pixels), splits["test"].labels)
    clean_features = features_of(clean, splits, device)
    head = evaluation.train_head(clean_features["train"], config.classes, config.head, config.seed)
    reference = splits["train"].pixels[evaluation.best_reference(head, clean_features["train"], config.target)]
    shadow = pretrain[: config.data.shadow_images or len(pretrain)]
    backdoored = badencoder.attack(clean, shadow, reference, config.trigger, config.badencoder, config.seed, device)
    save_encoder(backdoored, storage.join(config.out, "backdoored"))
    backdoored_features = features_of(backdoored, splits, device)
    result = evaluation.report(
        clean_features, backdoored_features, config.classes, config.target, config.head, config.seed
    )
    seconds = round(time.monotonic() - start)
    values = dataclasses.asdict(result) | {"seconds": seconds, "seed": config.seed, "target": config.target}
    storage.write_json(storage.join(config.out, "report.json"), values)
    return result


def pretrained(config: RedTeamConfig, pixels: Tensor, device: torch.device) -> Encoder:
    """The clean encoder: taken from an earlier run with the same settings, else pre-trained now."""
    folder = storage.join(config.out, "clean")
    settings = json.loads(json.dumps([to_mapping(config.simclr), to_mapping(config.encoder), config.seed, len(pixels)]))
    marker = storage.join(folder, "pretrain.json")
    if storage.exists(marker) and storage.read_json(marker)["settings"] == settings:
        log.info("reusing the pre-trained encoder in %s", folder)
        weights = storage.join(folder, "encoder.safetensors")
        return load_encoder(dataclasses.replace(config.encoder, weights=weights)).to(device)
    encoder = simclr.pretrain(pixels, config.encoder, config.simclr, config.seed, device)
    save_encoder(encoder, folder)
    storage.write_json(marker, {"settings": settings})
    return encoder


def features_of(encoder: Encoder, splits: dict[str, LabelledImages], device: torch.device) -> dict[str, Features]:
    return {name: Features(badencoder.embed(encoder, s.pixels, device), s.labels) for name, s in splits.items()}


def save_encoder(encoder: Encoder, folder: str) -> None:
    """encoder.safetensors and the encoder.yaml that describes it."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in encoder.backbone.state_dict().items()}
    storage.write_bytes(storage.join(folder, "encoder.safetensors"), safetensors.torch.save(tensors))
    values = to_mapping(encoder.spec) | {"weights": "encoder.safetensors"}
    storage.write_bytes(storage.join(folder, "encoder.yaml"), yaml.safe_dump(values, sort_keys=False).encode())


def table(result: AttackReport) -> str:
    rows: list[tuple[str, Callable[[AttackReport], float]]] = [
        ("kNN accuracy, clean encoder", lambda r: r.knn_accuracy),
        ("clean accuracy (clean encoder, clean images)", lambda r: r.clean_accuracy),
        ("backdoored accuracy (backdoored encoder, clean images)", lambda r: r.backdoored_accuracy),
        ("attack success (backdoored encoder, triggered images)", lambda r: r.asr),
        ("the same trigger on the clean encoder", lambda r: r.asr_clean_encoder),
        ("mean cosine among triggered embeddings", lambda r: r.cos_triggered),
        ("mean cosine among clean embeddings", lambda r: r.cos_clean),
    ]
    return "\n".join(f"{label:56s} {value(result):.3f}" for label, value in rows)


@click.command()
@click.argument("config", type=click.Path(exists=True))
@click.option("--preset", default="cpu", show_default=True, help="Section of `presets` in the YAML.")
@click.option("--out", help="Folder for the victim, instead of the one in the YAML.")
def main(config: str, preset: str, out: str | None) -> None:
    """Make the victim that CONFIG describes and measure the attack."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        settings = load_config(config, preset)
        if out:
            settings = dataclasses.replace(settings, out=out)
        click.echo(table(run(settings)))
        click.echo(f"Victim: {Path(settings.out) / 'backdoored' / 'encoder.yaml'}")
    except SanitizeError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
