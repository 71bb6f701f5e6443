"""`sanitize init`: sanitize.yaml and encoder.yaml, with comments, to be edited."""

from pathlib import Path

import yaml

from sanitize import storage
from sanitize.config import EncoderSpec
from sanitize.config_loading import to_mapping
from sanitize.errors import StorageError

TEMPLATE = """\
# Settings of `sanitize fit`, `scan` and `finetune`; options on the command line win. Delete what you do not change.
fit:
  shards: [aux/]            # images like those you will scan; no labels needed
  encoder: encoder.yaml     # the encoder under test, see below
  out: detector
  preset: default           # default: low-resolution decoder; paper: as published, about 100 times slower to train
  # training: {epochs: 20, learning_rate: 0.002}
scan:
  shards: [shards/]
  detector: detector
  out: scanned
  policy:
    policy: calibrated      # calibrated | fdr | fraction | absolute | robust
    fpr: 0.01               # share of clean samples you accept to lose
finetune:
  shards: [scanned/clean]
  encoder: encoder.yaml
  out: head
  mode: linear              # linear | mlp | full | contrastive
  label_member: cls         # cls, or json:<field>
  # validation: [validation/]
  # epochs: 20
"""
ENCODER_TEMPLATE = """\
# The encoder under test. Weights: safetensors, or a PyTorch file that loads with weights_only=True.
# `sanitize init --encoder hf:<folder>` (or torchvision:<name>, timm:<name>) fills it in from the model's own config.
architecture: resnet18      # resnet18|34|50, resnet18-cifar (3x3 stem), clip, hf:<folder>, torchvision:<name>, timm:<name>,
                            # exported:<file.pt2>
weights: encoder.safetensors
image_size: 224
mean: [0.485, 0.456, 0.406]
std: [0.229, 0.224, 0.225]
resize: squash              # squash shows the whole image; crop its central square
"""


SHOWN = (
    "architecture",
    "weights",
    "image_size",
    "mean",
    "std",
    "resize",
)  # settings in an encoder.yaml that is filled in


def init(encoder: str = "", weights: str = "") -> tuple[str, ...]:
    """Write both files into this folder; returns the names of those written. Raises StorageError when one is here already.

    encoder: an architecture whose own config fills in encoder.yaml; a sanitize.yaml that is here then stays. weights: its file
    """
    texts = {"sanitize.yaml": TEMPLATE, "encoder.yaml": _filled_in(encoder, weights) if encoder else ENCODER_TEMPLATE}
    if encoder and Path("sanitize.yaml").exists():
        del texts["sanitize.yaml"]
    for name, text in texts.items():
        if Path(name).exists():
            raise StorageError(f"{name}: is here already. Delete it first, or edit it.")
        Path(name).write_text(text)
    return tuple(texts)


def _filled_in(architecture: str, weights: str) -> str:
    """An encoder.yaml with all that the model's own config says."""
    from sanitize.stages.huggingface_folder import TOKENIZER
    from sanitize.stages.preprocessing import complete_spec, own_preprocessing

    spec = complete_spec(EncoderSpec(architecture, weights))
    family, _, folder = spec.architecture.partition(":")
    values = {name: value for name, value in to_mapping(spec).items() if name in SHOWN}
    values["weights"] = weights or "encoder.safetensors"
    if family in ("hf", "exported"):
        del values["weights"]
    source = own_preprocessing(spec.architecture).source
    text = f"# {architecture}; image_size, mean and std: {source}. Does it work? sanitize check-encoder encoder.yaml aux/\n"
    text += yaml.safe_dump(values, default_flow_style=None, sort_keys=False)
    if family == "hf" and storage.exists(tokenizer := storage.join(folder, TOKENIZER)):
        text += "# captions are compared with their images, and can be trained on; without this line: images only\n"
        text += yaml.safe_dump({"tokenizer": tokenizer})
    return text
