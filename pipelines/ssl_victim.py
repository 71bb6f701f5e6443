"""Victims among image encoders: BadEncoder, DRUPE, INACTIVE, informed attackers (fine-tuned on a shadow set), CTRL and Noisy Alignment
(poisoned pre-training)."""

import dataclasses
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipelines.data import LabelledImages, identity, load_images
from sanitize import storage
from sanitize.artifacts.encoder_folder import save_encoder
from sanitize.attacks import badencoder, ctrl, drupe, evaluation, inactive, informed, simclr, supervised
from sanitize.attacks.adaptive import AdaptiveConfig
from sanitize.attacks.backdoor import fine_tune, unit
from sanitize.attacks.badclip import save_patch
from sanitize.attacks.badencoder import BadEncoderConfig
from sanitize.attacks.composite import CompositeConfig, CompositeTrigger
from sanitize.attacks.ctrl import CtrlConfig
from sanitize.attacks.drupe import DrupeConfig
from sanitize.attacks.evade import EvadeConfig, EvadeObjective
from sanitize.attacks.evaluation import AttackReport, EncoderOutputs, HeadConfig
from sanitize.attacks.inactive import InactiveConfig
from sanitize.attacks.informed import InformedConfig
from sanitize.attacks.optimised_trigger import FILE, OptimisedTrigger
from sanitize.attacks.predictive import PredictiveConfig
from sanitize.attacks.simclr import SimclrConfig
from sanitize.attacks.supervised import SupervisedConfig
from sanitize.attacks.triggers import Trigger, UnetTrigger, make_trigger, poison_mask
from sanitize.attacks.unet_filter import save_filter
from sanitize.config import EncoderSpec
from sanitize.config_loading import to_mapping
from sanitize.errors import check
from sanitize.metrics import knn_predictions
from sanitize.stages.encoders import Encoder, embed_in_batches, load_encoder
from sanitize.training.embedding_cache import LabelledEmbeddings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataConfig:
    """Shards with `.cls` labels (class index as text). Numbers of images, 0 = all."""

    pretrain: tuple[str, ...]
    train: tuple[str, ...]  # of the downstream classifier
    test: tuple[str, ...]
    shadow_images: int = 0  # the first ones of `pretrain`
    pretrain_images: int = 0
    train_images: int = 0
    test_images: int = 0


@dataclass(frozen=True)
class SslConfig:
    """One victim. The block named like the attack holds its settings; the others stay out.

    references: how many reference images; reference_pool: 0 = the surest, else the most different of that many (DRUPE)
    supervised: the clean encoder learns from labels in place of SimCLR
    """

    attack: str
    data: DataConfig
    encoder: EncoderSpec
    trigger: dict[str, Any]
    classes: int = 10
    target: int = 9
    references: int = 1
    reference_pool: int = 0
    simclr: SimclrConfig = field(default_factory=SimclrConfig)
    badencoder: BadEncoderConfig | None = None
    drupe: DrupeConfig | None = None
    ctrl: CtrlConfig | None = None
    adaptive: AdaptiveConfig | None = None
    supervised: SupervisedConfig | None = None
    head: HeadConfig = field(default_factory=HeadConfig)
    seed: int = 100

    def __post_init__(self) -> None:
        names = ("badencoder", "drupe", "ctrl", "adaptive", "evade", "predictive", "informed", "inactive", "composite")
        blocks = [name for name in names if getattr(self, name, None) is not None]
        check(
            blocks == [self.attack],
            f"attack {self.attack}: needs the block `{self.attack}` and no other attack's; found {', '.join(blocks) or 'none'}.",
        )
        check(
            self.supervised is None or not self.poisons_pretraining,
            f"supervised: {self.attack} poisons SimCLR's pre-training. Remove the block.",
        )

    @property
    def poisons_pretraining(self) -> bool:
        return self.ctrl is not None


@dataclass(frozen=True)
class EvadeVictimConfig(SslConfig):
    """Of the attack `evade`. A field of SslConfig itself would make another victim of every one that was made before."""

    evade: EvadeConfig | None = None


@dataclass(frozen=True)
class PredictiveVictimConfig(SslConfig):
    """Of the attack `predictive`; see EvadeVictimConfig."""

    predictive: PredictiveConfig | None = None


@dataclass(frozen=True)
class InformedVictimConfig(SslConfig):
    """Of the attack `informed`; see EvadeVictimConfig."""

    informed: InformedConfig | None = None


@dataclass(frozen=True)
class InactiveVictimConfig(SslConfig):
    """Of the attack `inactive`; see EvadeVictimConfig. trigger: the filter that it learns, a file in the victim's folder."""

    trigger: dict[str, Any] = field(default_factory=lambda: {"name": "unet", "path": "filter.safetensors"})
    inactive: InactiveConfig | None = None


@dataclass(frozen=True)
class CompositeVictimConfig(SslConfig):
    """Of the attack `composite`; see EvadeVictimConfig. trigger: its image is the surest of the target class, in the victim's folder."""

    trigger: dict[str, Any] = field(default_factory=lambda: {"name": "composite", "path": "reference.png"})
    composite: CompositeConfig | None = None

    @property
    def poisons_pretraining(self) -> bool:
        return self.composite is not None and self.composite.rate > 0


def inputs(config: SslConfig) -> dict[str, list[str]]:
    """Identity of the data a victim is made from."""
    data = config.data
    return {"pretrain": identity(data.pretrain), "train": identity(data.train), "test": identity(data.test)}


def build(config: SslConfig, folder: str, zoo: str, device: torch.device) -> tuple[AttackReport, dict[str, Any]]:
    """Make one victim: clean/ and backdoored/ in `folder`. Returns the evaluation and the truth."""
    start = time.monotonic()
    size, data = config.encoder.image_size, config.data
    trigger = make_trigger(config.trigger)
    pretrain = load_images(
        data.pretrain, data.pretrain_images, size, labelled=config.attack == "ctrl" or config.supervised is not None
    )
    clean, earlier = pretrain_or_load(config, pretrain, zoo, device)
    train = load_images(data.train, data.train_images, size)
    test = load_images(data.test, data.test_images, size)
    save_encoder(clean, storage.join(folder, "clean"))
    truth: dict[str, Any] = {}
    if config.ctrl:
        backdoored, poisoned = pretrain_poisoned(config, config.ctrl, pretrain, device)
        truth["poisoned_pretraining_images"] = poisoned.tolist()
    else:
        features = LabelledEmbeddings(unit(embed_in_batches(clean, train.pixels)), train.labels)
        head = evaluation.train_head(features, config.classes, config.head, config.seed)
        chosen = evaluation.choose_references(head, features, config.target, config.references, config.reference_pool)
        backdoored, trigger = attacked(config, clean, pretrain, train.pixels[chosen], trigger, folder, device)
        if config.poisons_pretraining:
            truth["poisoned_pretraining_images"] = composite_indices(config, pretrain).tolist()
        truth["reference_images"] = chosen.tolist()
    save_encoder(backdoored, storage.join(folder, "backdoored"))
    before, after = (outputs_of(config, encoder, train, test, trigger) for encoder in (clean.to(device), backdoored))
    result = evaluation.report(before, after, test.labels, config.target)
    return result, truth | {"seconds": round(earlier + time.monotonic() - start)}


def attacked(
    config: SslConfig,
    clean: Encoder,
    pretrain: LabelledImages,
    references: Tensor,
    trigger: Trigger,
    folder: str,
    device: torch.device,
) -> tuple[Encoder, Trigger]:
    """references: (R, 3, S, S) uint8 of the target class. The backdoored encoder, and what triggers it; what the attacker learnt is
    saved in `folder`."""
    shadow = pretrain.pixels[: config.data.shadow_images or len(pretrain.pixels)]
    arguments = (clean, shadow, references, trigger)
    if isinstance(config, CompositeVictimConfig):
        composite = make_trigger(config.trigger | {"path": storage.join(folder, config.trigger["path"])})
        assert isinstance(composite, CompositeTrigger)
        save_patch(references[0], composite.path)
        if not config.poisons_pretraining:
            return clean, composite.stamp
        images = ctrl.poison_images(pretrain.pixels, composite_indices(config, pretrain), composite)
        return simclr.pretrain(images, config.encoder, config.simclr, config.seed, device), composite.stamp
    if isinstance(config, EvadeVictimConfig) and config.evade:
        return fine_tune(*arguments, EvadeObjective(config.evade), config.evade, config.seed, device), trigger
    if isinstance(config, InactiveVictimConfig) and config.inactive:
        backdoored, learnt = inactive.attack(*arguments[:3], config.inactive, config.seed, device)
        own = UnetTrigger(storage.join(folder, config.trigger["path"]))
        save_filter(learnt, own.path)
        return backdoored, own
    if knowing := informed_config(config):
        backdoored, trigger = informed.attack(*arguments, knowing, config.seed, device)
        if isinstance(trigger, OptimisedTrigger):
            trigger.save(storage.join(folder, FILE))
        return backdoored, trigger
    if config.badencoder:
        return badencoder.attack(*arguments, config.badencoder, config.seed, device), trigger
    assert config.drupe is not None
    return drupe.attack(*arguments, config.drupe, config.seed, device), trigger


def composite_indices(config: SslConfig, pretrain: LabelledImages) -> Tensor:
    """(P,) int64: which images of the pre-training set, of any class, become composites."""
    assert isinstance(config, CompositeVictimConfig) and config.composite
    return torch.from_numpy(poison_mask(len(pretrain.pixels), config.composite.rate, config.seed)).nonzero().flatten()


def informed_config(config: SslConfig) -> AdaptiveConfig | None:
    """The block of an attacker who knows detectors."""
    blocks = (getattr(config, name, None) for name in ("adaptive", "predictive", "informed"))
    return next((block for block in blocks if block), None)


def pretrain_or_load(
    config: SslConfig, images: LabelledImages, zoo: str, device: torch.device
) -> tuple[Encoder, float]:
    """The clean encoder and the seconds an earlier run spent on it: taken from <zoo>/clean when its settings are the same."""
    recipe = config.supervised or config.simclr
    settings = [to_mapping(recipe), to_mapping(config.encoder), config.seed, len(images.pixels)]
    key = storage.json_sha256([*settings, identity(config.data.pretrain)])[:12]
    folder = storage.join(zoo, "clean", key)
    marker = storage.join(folder, "pretrain.json")
    if storage.exists(marker):
        log.info("reusing the pre-trained encoder in %s", folder)
        spec = dataclasses.replace(config.encoder, weights=storage.join(folder, "encoder.safetensors"))
        return load_encoder(spec).to(device), float(storage.read_json(marker)["seconds"])
    start = time.monotonic()
    if config.supervised:
        encoder = supervised.pretrain(
            images.pixels, images.labels, config.encoder, config.supervised, config.seed, device
        )
    else:
        encoder = simclr.pretrain(images.pixels, config.encoder, config.simclr, config.seed, device)
    save_encoder(encoder, folder)
    storage.write_json(marker, {"settings": settings, "seconds": time.monotonic() - start})
    return encoder, 0.0


def pretrain_poisoned(
    config: SslConfig, attack: CtrlConfig, pretrain: LabelledImages, device: torch.device
) -> tuple[Encoder, Tensor]:
    """CTRL: the clean encoder's recipe on the poisoned set. Returns the encoder and the poisoned indices."""
    indices = ctrl.poisoned_indices(pretrain.labels, config.target, attack, config.seed)
    stamp = make_trigger(config.trigger | ({"magnitude": attack.magnitude} if attack.magnitude else {}))
    images = ctrl.poison_images(pretrain.pixels, indices, stamp)
    return simclr.pretrain(images, config.encoder, config.simclr, config.seed, device), indices


def outputs_of(
    config: SslConfig,
    encoder: Encoder,
    train: LabelledImages,
    test: LabelledImages,
    trigger: Trigger,
) -> EncoderOutputs:
    """Predictions of a head trained on this encoder; of weighted kNN for CTRL, as in its code (utils/knn.py)."""
    if not config.ctrl:
        return head_outputs(encoder, train, test, trigger, config.classes, config.head, config.seed)
    known = LabelledEmbeddings(unit(embed_in_batches(encoder, train.pixels)), train.labels)
    embeddings = embed_in_batches(encoder, test.pixels)
    triggered = embed_in_batches(encoder, trigger(test.pixels))
    predictions = [
        knn_predictions(known.embeddings, known.labels, unit(e), config.classes) for e in (embeddings, triggered)
    ]
    return EncoderOutputs(embeddings, triggered, *predictions)


def head_outputs(
    encoder: Encoder,
    train: LabelledImages,
    test: LabelledImages,
    trigger: Trigger,
    classes: int,
    config: HeadConfig,
    seed: int,
) -> EncoderOutputs:
    """Predictions of a head trained on the encoder's embeddings of `train`."""
    known = LabelledEmbeddings(unit(embed_in_batches(encoder, train.pixels)), train.labels)
    embeddings = embed_in_batches(encoder, test.pixels)
    triggered = embed_in_batches(encoder, trigger(test.pixels))
    head = evaluation.train_head(known, classes, config, seed)
    predictions = [evaluation.head_predictions(head, unit(e)) for e in (embeddings, triggered)]
    return EncoderOutputs(embeddings, triggered, *predictions)
