"""What a training leaves: the files of head and encoder, and how good they are on validation and triggered shards."""

from collections.abc import Callable

import numpy as np
import safetensors.torch
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from sanitize import metrics, storage
from sanitize.config import EncoderSpec, FinetuneConfig, load_encoder_spec, to_mapping
from sanitize.material import Material, embedded
from sanitize.objectives import Classifier, Features, Towers
from sanitize.runtime import Resources
from sanitize.stages.contrastive import Clip, class_embeddings, save_clip
from sanitize.stages.encoders import Encoder, load_encoder
from sanitize.stages.heads import Head, TrainedHead, load_head, save_head
from sanitize.stages.text import load_text_encoder

SETTINGS = ("mode", "epochs", "batch_size", "learning_rate", "weight_decay", "seed")  # remembered in head.json


def write_trained(config: FinetuneConfig, model: nn.Module, fingerprint: str, classes: tuple[str, ...]) -> EncoderSpec:
    """Write head and encoder, whichever was trained; returns the encoder that goes with them.

    fingerprint: of the encoder before training
    """
    model.eval().requires_grad_(False)
    if isinstance(model, Towers):
        text = load_text_encoder(config.encoder)
        text.tower.load_state_dict(model.text.state_dict())
        save_clip(Clip(model.image, text, model.logit_scale), config.out)
        return load_encoder_spec(storage.join(config.out, "encoder.yaml"))
    spec, head = config.encoder, model
    if isinstance(model, Classifier):
        spec, head = _save_encoder(model.encoder, config.out), model.head
        fingerprint = load_encoder(spec).fingerprint()
    assert isinstance(head, Head)
    values = to_mapping(config)
    save_head(TrainedHead(head, classes, fingerprint), config.out, {name: values[name] for name in SETTINGS})
    return spec


def _save_encoder(encoder: Encoder, folder: str) -> EncoderSpec:
    """encoder.safetensors and the encoder.yaml that describes it. Of a CLIP the image tower only."""
    prefix = "visual." if encoder.spec.architecture == "clip" else ""
    tensors = {f"{prefix}{name}": t.detach().cpu().contiguous() for name, t in encoder.backbone.state_dict().items()}
    storage.write_bytes(storage.join(folder, "encoder.safetensors"), safetensors.torch.save(tensors))
    values = to_mapping(encoder.spec) | {"weights": "encoder.safetensors", "tokenizer": ""}
    path = storage.join(folder, "encoder.yaml")
    storage.write_bytes(path, yaml.safe_dump(values, sort_keys=False).encode())
    return load_encoder_spec(path)


def evaluate(
    config: FinetuneConfig,
    spec: EncoderSpec,
    classes: tuple[str, ...],
    materials: dict[str, Material],
    bank: Features | None,
    cache: str,
    resources: Resources,
) -> dict[str, float]:
    """The final weights on the shards `validation` and `triggered`; rates in [0, 1].

    spec: the encoder that goes with the head, or the fine-tuned CLIP. bank: training embeddings for kNN, when there are any.
    """
    if not classes or not {"validation", "triggered"} & set(materials):
        return {}
    encoder = load_encoder(spec)
    fingerprint = encoder.fingerprint()
    predict = _predictor(config, spec, encoder, classes)
    found: dict[str, float] = {}
    measured = [material for name, material in materials.items() if name != "shards"]
    sets = embedded(config, spec, fingerprint, measured, cache, resources)
    if "validation" in sets:
        features = sets["validation"]
        labels = features.labels.numpy()
        found["clean_accuracy"] = metrics.accuracy(predict(features.embeddings), labels)
        if bank is not None:
            known, queries = (functional.normalize(f.embeddings, dim=1) for f in (bank, features))
            votes = metrics.knn_predictions(known, bank.labels, queries, len(classes))
            found["knn_accuracy"] = metrics.accuracy(votes.numpy(), labels)
    if "triggered" in sets:
        features = sets["triggered"]
        predictions = predict(features.embeddings)
        found["attack_success"] = metrics.attack_success(predictions, features.labels.numpy(), config.target)
        found["attack_success_with_target"] = metrics.attack_success_with_target(predictions, config.target)
    return found


def _predictor(
    config: FinetuneConfig, spec: EncoderSpec, encoder: Encoder, classes: tuple[str, ...]
) -> Callable[[Tensor], NDArray[np.int64]]:
    """embeddings (B, D) → class numbers (B,), by the trained head or, of a CLIP, by the nearest class name."""
    if config.mode != "contrastive":
        return load_head(config.out, encoder).predictions
    names = class_embeddings(load_text_encoder(spec), classes, config.prompts)

    @torch.no_grad()
    def nearest(embeddings: Tensor) -> NDArray[np.int64]:
        found: NDArray[np.int64] = metrics.zero_shot_predictions(embeddings, names).numpy()
        return found

    return nearest
