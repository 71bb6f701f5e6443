"""`sanitize init`: sanitize.yaml and encoder.yaml, with comments, to be edited."""

from pathlib import Path

import yaml

from sanitize import storage
from sanitize.config import EncoderSpec
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

    family, _, folder = architecture.partition(":")
    spec = complete_spec(EncoderSpec(architecture, weights))
    values: dict[str, object] = {"architecture": spec.architecture}
    if family not in ("hf", "exported"):
        values["weights"] = weights or "encoder.safetensors"
    values |= {"image_size": spec.image_size, "mean": list(spec.mean), "std": list(spec.std), "resize": spec.resize}
    lines = [
        f"# {architecture}; image_size, mean and std from {own_preprocessing(spec.architecture).source}. To see that it works:",
        "#   sanitize check-encoder encoder.yaml aux/",
    ]
    lines += [yaml.safe_dump({key: value}, default_flow_style=None).strip() for key, value in values.items()]
    folder = spec.architecture.partition(":")[2]
    if family == "hf" and storage.exists(storage.join(folder, TOKENIZER)):
        lines += ["# captions are compared with their images, and can be trained on; without this line images only"]
        lines += [f"tokenizer: {storage.join(folder, TOKENIZER)}"]
    return "\n".join(lines) + "\n"
