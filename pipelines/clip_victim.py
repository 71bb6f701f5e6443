"""Victims among CLIP models: text-on-pair poisoning and BadCLIP, on a tiny CLIP trained here or on a real checkpoint."""

import copy
import dataclasses
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipelines.data import identity, load_images
from sanitize import storage
from sanitize.artifacts.encoder_folder import save_clip
from sanitize.attacks import badclip, clip_text, contrastive, evaluation, tiny_clip
from sanitize.attacks.backdoor import unit
from sanitize.attacks.badclip import AlignedPatchConfig, PatchConfig
from sanitize.attacks.contrastive import ContrastiveConfig, Pairs
from sanitize.attacks.evaluation import AttackReport, EncoderOutputs
from sanitize.attacks.triggers import Trigger, make_trigger
from sanitize.config import EncoderSpec
from sanitize.config_loading import to_mapping
from sanitize.errors import check
from sanitize.stages.encoders import embed_in_batches
from sanitize.training.clip import Clip, class_embeddings, load_clip

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairData:
    """Captioned shards to train on and labelled ones (`.cls`) to test on; without shards, procedural coloured shapes.

    classes, prompts: of the zero-shot classifier; a prompt holds {} for the class name. Numbers: 0 = all
    """

    train: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    train_pairs: int = 5000
    test_images: int = 800
    caption_member: str = "txt"
    classes: tuple[str, ...] = tuple(tiny_clip.COLOURS)
    prompts: tuple[str, ...] = tiny_clip.PROMPTS


@dataclass(frozen=True)
class ClipConfig:
    """One victim. `encoder` with weights and tokenizer is loaded, without it is a tiny CLIP trained by `pretrain`.

    trigger: of clip_text; patch: of badclip. rate: share of the training pairs that is poisoned
    """

    attack: str
    encoder: EncoderSpec
    target: str
    fine_tune: ContrastiveConfig
    rate: float
    data: PairData = field(default_factory=PairData)
    pretrain: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    trigger: dict[str, Any] | None = None
    patch: PatchConfig | None = None
    seed: int = 100

    def __post_init__(self) -> None:
        wanted = "patch" if self.attack.startswith("badclip") else "trigger"
        check(
            (self.patch is None) != (self.trigger is None) and getattr(self, wanted) is not None,
            f"attack {self.attack}: needs the block `{wanted}` and not the other of trigger and patch.",
        )
        check(
            self.target in self.data.classes,
            f"target: {self.target!r} is not one of the classes {', '.join(self.data.classes)}.",
        )
        check(
            bool(self.encoder.weights) == bool(self.encoder.tokenizer),
            "encoder: a real CLIP needs both weights and tokenizer, the tiny one neither.",
        )


@dataclass(frozen=True)
class AlignedClipConfig(ClipConfig):
    """Of the attack `badclip_aligned`. Fields of PatchConfig itself would make another victim of every one that was made before."""

    patch: AlignedPatchConfig | None = None


def inputs(config: ClipConfig) -> dict[str, list[str]]:
    weights = [storage.file_sha256(config.encoder.weights)] if config.encoder.weights else []
    return {"train": identity(config.data.train), "test": identity(config.data.test), "weights": weights}


def build(config: ClipConfig, folder: str, zoo: str, device: torch.device) -> tuple[AttackReport, dict[str, Any]]:
    """Make one victim: clean/ and backdoored/ in `folder`. Returns the evaluation and the truth."""
    start = time.monotonic()
    pairs, test = load_pairs(config)
    clean, earlier = clean_clip(config, pairs, zoo, device)
    save_clip(clean, storage.join(folder, "clean"))
    captions = clip_text.target_captions(pairs, config.target, config.data.prompts)
    trigger = (
        make_trigger(config.trigger)
        if config.trigger
        else optimise_trigger(config, clean, pairs, captions, folder, device)
    )
    indices = clip_text.poisoned_indices(pairs, config.target, config.rate, config.seed)
    poisoned = clip_text.poison_pairs(pairs, indices, captions, trigger, config.seed)
    backdoored = contrastive.train(copy.deepcopy(clean), poisoned, config.fine_tune, config.seed, device)
    save_clip(backdoored, storage.join(folder, "backdoored"))
    before, after = (outputs_of(config, clip, test, trigger, device) for clip in (clean, backdoored))
    result = evaluation.report(before, after, test.labels, config.data.classes.index(config.target))
    truth = {
        "poisoned_pairs": indices.tolist(),
        "poisoned_captions": [poisoned.captions[i] for i in indices.tolist()],
        "seconds": round(earlier + time.monotonic() - start),
    }
    return result, truth


def load_pairs(config: ClipConfig) -> tuple[Pairs, Pairs]:
    """Training pairs and labelled test images."""
    data, size = config.data, config.encoder.image_size
    if not data.train:
        return (
            tiny_clip.coloured_shapes(data.train_pairs, config.seed, size),
            tiny_clip.coloured_shapes(data.test_images, config.seed + 1, size),
        )
    train = load_images(data.train, data.train_pairs, size, labelled=False, caption_member=data.caption_member)
    test = load_images(data.test, data.test_images, size)
    return Pairs(train.pixels, train.captions, train.labels), Pairs(test.pixels, (), test.labels)


def clean_clip(config: ClipConfig, pairs: Pairs, zoo: str, device: torch.device) -> tuple[Clip, float]:
    """The clean model and the seconds an earlier run spent on it: loaded, taken from <zoo>/clean, or trained now."""
    if config.encoder.weights:
        return load_clip(config.encoder), 0.0
    settings = [to_mapping(config.pretrain), to_mapping(config.encoder), config.seed, len(pairs.captions)]
    folder = storage.join(zoo, "clean", storage.json_sha256([*settings, "coloured shapes 1"])[:12])
    marker, weights = storage.join(folder, "pretrain.json"), storage.join(folder, "encoder.safetensors")
    spec = dataclasses.replace(config.encoder, tokenizer=storage.join(folder, "tokenizer.json"))
    if storage.exists(marker):
        log.info("reusing the clean CLIP in %s", folder)
        clip = load_clip(dataclasses.replace(spec, weights=weights))
        return clip, float(storage.read_json(marker)["seconds"])
    start = time.monotonic()
    words = tiny_clip.write_tokenizer(spec.tokenizer)
    clip = contrastive.train(tiny_clip.build(spec, words, config.seed), pairs, config.pretrain, config.seed, device)
    save_clip(clip, folder)
    storage.write_json(marker, {"settings": settings, "seconds": time.monotonic() - start})
    return clip, 0.0


def optimise_trigger(
    config: ClipConfig, clean: Clip, pairs: Pairs, captions: tuple[str, ...], folder: str, device: torch.device
) -> Trigger:
    """BadCLIP's stage 1: the patch, kept as <folder>/trigger.png."""
    assert config.patch is not None
    mentions = torch.tensor([config.target in caption.split() for caption in pairs.captions])
    others, positives = pairs.images[~mentions], pairs.images[mentions]
    patch = badclip.optimise_patch(clean, others, positives, captions, config.patch, config.seed, device)
    path = storage.join(folder, "trigger.png")
    badclip.save_patch(patch, path)
    return make_trigger({"name": "image", "path": path})


def outputs_of(config: ClipConfig, clip: Clip, test: Pairs, trigger: Trigger, device: torch.device) -> EncoderOutputs:
    """Zero-shot predictions: the class whose prompts lie nearest."""
    classes = class_embeddings(clip.text.to(device), config.data.classes, config.data.prompts)

    def nearest(embeddings: Tensor) -> Tensor:
        return (unit(embeddings) @ classes.T).argmax(dim=1)

    embeddings = embed_in_batches(clip.image.to(device), test.images)
    triggered = embed_in_batches(clip.image, trigger(test.images))
    return EncoderOutputs(embeddings, triggered, nearest(embeddings), nearest(triggered))
