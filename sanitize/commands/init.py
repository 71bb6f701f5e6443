"""`sanitize init`: sanitize.yaml and encoder.yaml, with comments, to be edited."""

from pathlib import Path

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
architecture: resnet18      # resnet18|34|50, resnet18-cifar (3x3 stem), clip, timm:<name>, exported:<file.pt2>
weights: encoder.safetensors
image_size: 224
mean: [0.485, 0.456, 0.406]
std: [0.229, 0.224, 0.225]
resize: squash              # squash shows the whole image; crop its central square
"""


def init() -> tuple[str, ...]:
    """Write both files into this folder; returns their names. Raises StorageError when one is here already."""
    for name, text in (("sanitize.yaml", TEMPLATE), ("encoder.yaml", ENCODER_TEMPLATE)):
        if Path(name).exists():
            raise StorageError(f"{name}: is here already. Delete it first, or edit it.")
        Path(name).write_text(text)
    return "sanitize.yaml", "encoder.yaml"
