"""Victims of a real encoder: a public one (photo_data.py), fine-tuned for a few steps so that a trigger takes its photos to a class.

clean/ is the control, and what an honest fine-tuner would have made: the public encoder after as many steps with labels and no trigger.
The public encoder itself, the ancestor of both, is what `fit --reference` may look through. Success is judged by the ancestor's own
ImageNet classifier.
"""

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.data import LabelledImages, identity, load_images
from pipelines.photo_data import load_classifier
from pipelines.ssl_victim import DataConfig
from sanitize import storage
from sanitize.artifacts.encoder_folder import save_encoder
from sanitize.attacks import evaluation
from sanitize.attacks.augment import flip_and_jitter
from sanitize.attacks.backdoor import BackdoorObjective, FineTuneConfig, fine_tune, trainable_copy, unit
from sanitize.attacks.badencoder import BadEncoderConfig, BadEncoderObjective
from sanitize.attacks.evade import EvadeConfig, EvadeObjective
from sanitize.attacks.evaluation import AttackReport, EncoderOutputs
from sanitize.attacks.triggers import Trigger, make_trigger
from sanitize.config_loading import load_encoder_spec, to_mapping
from sanitize.errors import check
from sanitize.stages.encoders import Encoder, embed_in_batches, load_encoder
from sanitize.training.embedding_cache import LabelledEmbeddings
from sanitize.training.split import shuffled_batches

log = logging.getLogger(__name__)
BATCH = 16  # photographs that are embedded at once


@dataclass(frozen=True)
class PhotoConfig:
    """One victim. The block `badencoder` or `evade` holds its settings.

    encoder, classifier: of pipelines/photo_data.py. data: `pretrain` is the attacker's shadow set, `train` has labels of ImageNet (the
    reference image is one of the target class there), and so has `test`.
    frozen: parameters whose names begin so do not learn. control: the honest fine-tuning of clean/
    """

    attack: str
    encoder: str
    classifier: str
    data: DataConfig
    trigger: dict[str, Any]
    target: int
    frozen: tuple[str, ...] = ()
    badencoder: BadEncoderConfig | None = None
    evade: EvadeConfig | None = None
    control: FineTuneConfig = field(default_factory=FineTuneConfig)
    seed: int = 100

    def __post_init__(self) -> None:
        check(
            bool(self.badencoder) != bool(self.evade), "photos: needs the block `badencoder` or `evade`, and not both."
        )

    @property
    def tuning(self) -> FineTuneConfig:
        tuning = self.badencoder or self.evade
        assert tuning
        return tuning

    def objective(self) -> BackdoorObjective:
        return EvadeObjective(self.evade) if self.evade else BadEncoderObjective(self.badencoder or BadEncoderConfig())


def inputs(config: PhotoConfig) -> dict[str, list[str]]:
    """Identity of the data a victim is made from."""
    data = config.data
    encoder = storage.file_sha256(load_encoder_spec(config.encoder).weights)
    shards = {"pretrain": identity(data.pretrain), "train": identity(data.train), "test": identity(data.test)}
    return shards | {"encoder": [encoder]}


def build(config: PhotoConfig, folder: str, zoo: str, device: torch.device) -> tuple[AttackReport, dict[str, Any]]:
    """Make one victim: clean/ and backdoored/ in `folder`. Returns the evaluation and the truth."""
    start = time.monotonic()
    ancestor = load_encoder(load_encoder_spec(config.encoder))
    size, data = ancestor.spec.image_size, config.data
    trigger, classifier = make_trigger(config.trigger), load_classifier(config.classifier)
    shadow = load_images(data.pretrain, data.shadow_images, size, labelled=False).pixels
    train = load_images(data.train, data.train_images, size)
    test = load_images(data.test, data.test_images, size)
    control = tune_or_load(config, ancestor, classifier, train, zoo, device)
    save_encoder(control, storage.join(folder, "clean"))
    reference = choose_reference(ancestor, classifier, train, config.target)
    backdoored = fine_tune(
        ancestor,
        shadow,
        train.pixels[reference],
        trigger,
        config.objective(),
        config.tuning,
        config.seed,
        device,
        config.frozen,
        adam=True,
    )
    save_encoder(backdoored, storage.join(folder, "backdoored"))
    before, after = (outputs_of(encoder, classifier, test, trigger) for encoder in (ancestor, backdoored))
    result = evaluation.report(before, after, test.labels, config.target)
    kept = {
        f"cosine_to_ancestor_{name}": float((unit(outputs) * unit(before.embeddings)).sum(dim=1).mean())
        for name, outputs in (
            ("backdoored", after.embeddings),
            ("clean", embed_in_batches(control, test.pixels, BATCH)),
        )
    }
    return result, kept | {"reference_images": reference.tolist(), "seconds": round(time.monotonic() - start)}


def choose_reference(encoder: Encoder, classifier: nn.Module, images: LabelledImages, target: int) -> Tensor:
    """(1,) position of the image of the target class that the classifier is surest of."""
    positions = (images.labels == target).nonzero().flatten()
    check(len(positions) > 0, f"target {target}: no image of data.train has that class.")
    embeddings = embed_in_batches(encoder, images.pixels[positions], BATCH)
    features = LabelledEmbeddings(embeddings, images.labels[positions])
    return positions[evaluation.choose_references(classifier, features, target, 1)]


def outputs_of(encoder: Encoder, classifier: nn.Module, test: LabelledImages, trigger: Trigger) -> EncoderOutputs:
    embeddings, triggered = (embed_in_batches(encoder, p, BATCH) for p in (test.pixels, trigger(test.pixels)))
    predictions = [evaluation.head_predictions(classifier, e) for e in (embeddings, triggered)]
    return EncoderOutputs(embeddings, triggered, *predictions)


# ---------------------------------------------------------------- the control


def tune_or_load(
    config: PhotoConfig,
    ancestor: Encoder,
    classifier: nn.Module,
    images: LabelledImages,
    zoo: str,
    device: torch.device,
) -> Encoder:
    """The honestly fine-tuned encoder: taken from <zoo>/clean when one of the same settings is there."""
    settings = [to_mapping(config.control), config.frozen, config.seed, inputs(config)["encoder"]]
    key = storage.json_sha256([*settings, len(images.pixels), identity(config.data.train)])[:12]
    folder = storage.join(zoo, "clean", key)
    description = storage.join(folder, "encoder.yaml")
    if not storage.exists(description):
        save_encoder(tune_with_labels(ancestor, classifier, images, config, device), folder)
    return load_encoder(load_encoder_spec(description)).to(device)


def tune_with_labels(
    ancestor: Encoder, classifier: nn.Module, images: LabelledImages, config: PhotoConfig, device: torch.device
) -> Encoder:
    """Cross entropy of the ancestor's classifier, mirror images and colour jitter; BatchNorm and frozen layers as in an attack."""
    control = config.control
    encoder, optimizer = trainable_copy(ancestor.to(device), control, config.frozen, adam=True)
    generator = torch.Generator().manual_seed(config.seed)
    classifier = classifier.to(device)
    for epoch in range(1, control.epochs + 1):
        for batch in shuffled_batches(len(images.pixels), control.batch_size, generator):
            views = flip_and_jitter(images.pixels[batch].to(device).float() / 255, generator)
            loss = nn.functional.cross_entropy(classifier(encoder(views)), images.labels[batch].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        log.info("control epoch %d/%d loss %.3f", epoch, control.epochs, loss.item())
    classifier.cpu()
    return encoder.eval().requires_grad_(False)
