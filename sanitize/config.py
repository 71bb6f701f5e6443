"""Settings: one frozen dataclass per command. `__post_init__` makes text of paths and checks; config_loading.py fills them from YAML."""

import contextlib
from dataclasses import dataclass, field

from sanitize.config_models import STUDENT_VIEWS, DecoderConfig, PredictionConfig
from sanitize.errors import ConfigError, check
from sanitize.paths import PathField, Paths, default, take_paths

UNSET = "unset"  # metadata of a field: the value with which it is left out of what is written, as before there was such a field


@dataclass(frozen=True)
class EncoderSpec:
    """The encoder under test, as its YAML file describes it.

    architecture: resnet10 | resnet18 | resnet34 | resnet50 (ImageNet stem), the same with "-cifar" (3x3 stem, no max-pool),
                  clip (OpenAI or open_clip file, shapes inferred), hf:<Hugging Face folder or hub name>, timm:<name>,
                  torchvision:<name>, or exported:<file.pt2>
    weights:      safetensors or a weights-only PyTorch file; not used by hf: and exported:
    image_size:   side of the square input in pixels; mean, std: per channel, for pixels in [0, 1]. Left out, they come from the
                  model's own config, if it has one (stages/preprocessing.py), else: 224 pixels and ImageNet's
    resize:       "squash" shows the whole image, "crop" its central square
    quick_gelu:   of CLIP's transformers: true for OpenAI's weights, false for most of open_clip's
    tokenizer:    of a CLIP whose captions are to be compared with the images: a tokenizer.json, or open_clip (its vocabulary)
    pooling:      of hf: vision transformers cls (class token), mean (of the patch tokens) or pooler, of timm: its global_pool; left out,
                  the model's own
    width, stem_stride: of small ResNets made for tests; 64 and 1 are the published ones
    """

    architecture: str
    weights: PathField = default("")
    image_size: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize: str = "squash"
    quick_gelu: bool = True
    tokenizer: PathField = default("")
    width: int = 64
    stem_stride: int = 1
    pooling: str = field(default="", metadata={UNSET: ""})

    def __post_init__(self) -> None:
        take_paths(self, one=("weights", "tokenizer"))
        check(0 <= self.image_size <= 4096, f"image_size: {self.image_size} is not between 1 and 4096 pixels.")
        check(self.resize in ("squash", "crop"), f"resize: {self.resize!r} is not 'squash' or 'crop'.")
        check(
            len(self.mean) in (0, 3) and len(self.std) in (0, 3),
            "mean and std: give three numbers each, for red, green, blue.",
        )
        check(min(self.std, default=1) > 0, "std: every value must be above 0.")
        check(self.width >= 1 and self.stem_stride in (1, 2), "width must be at least 1, stem_stride 1 or 2.")
        check(
            not self.pooling or self.architecture.startswith(("hf:", "timm:")),
            f"pooling: only hf: and timm: architectures have a choice, not {self.architecture}. Remove it from the encoder YAML.",
        )
        check(
            not self.tokenizer or self.architecture == "clip" or self.architecture.startswith("hf:"),
            f"tokenizer: only architectures clip and hf: have a text tower to use it with, not {self.architecture}.",
        )


@dataclass(frozen=True)
class TrainingConfig:
    """How the decoder is fitted. mask_ratio_min..max: a ratio is drawn for every batch; the test condition is 0.99."""

    epochs: int = 20
    batch_size: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 1e-6
    mask_ratio_min: float = 0.75
    mask_ratio_max: float = 1.0
    schedule: str = "cosine"
    calibration_fraction: float = 0.2
    precision: str = "auto"

    def __post_init__(self) -> None:
        check(self.epochs >= 1 and self.batch_size >= 1, "training.epochs and training.batch_size must be at least 1.")
        check(self.learning_rate > 0, f"training.learning_rate: {self.learning_rate} is not above 0.")
        check(
            0 < self.mask_ratio_min <= self.mask_ratio_max <= 1,
            "training.mask_ratio_min and mask_ratio_max: 0 < min <= max <= 1.",
        )
        check(
            self.schedule in ("cosine", "constant"), f"training.schedule: {self.schedule!r} is not cosine or constant."
        )
        check(0 < self.calibration_fraction < 1, "training.calibration_fraction must be between 0 and 1.")
        check_precision(self.precision)


def check_out(out: str) -> None:
    check(bool(out.strip("/")), f"out: {out!r} is no folder of your own. Name one to write to.")


PRECISIONS = ("auto", "bf16", "fp32")


def check_precision(precision: str) -> None:
    check(precision in PRECISIONS, f"precision: {precision!r} is not one of {', '.join(PRECISIONS)}.")


SCORERS = ("evidence", "reaction", "lowres", "paper")  # stages/scoring.py; a test holds both equal


@dataclass(frozen=True)
class FitConfig:
    """`sanitize fit`: auxiliary shards + encoder → detector folder.

    reference: an encoder that the suspect's maker does not control, best the ancestor the suspect was fine-tuned from
    contamination: share of the auxiliary images, at most, that may be poison themselves, as where they are a part of what is scanned
    """

    shards: Paths
    encoder: EncoderSpec
    out: PathField = default("detector")
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    prediction: PredictionConfig = field(default_factory=PredictionConfig)
    reference: EncoderSpec | None = None
    scorer: str = "evidence"
    test_mask_ratio: float = 1.0
    contamination: float = 0.0
    seed: int = 21
    image_member: str = ""
    limit: int = 0  # use at most this many auxiliary images; 0 = all
    workers: int = -1  # -1 = as many as the machine has room for, 0 = this process, without Ray
    gpus_per_worker: float = -1.0
    cpus_per_worker: int = 0
    batch_size: int = 256
    address: str = ""

    def __post_init__(self) -> None:
        take_paths(self, one=["out"], several=["shards"])
        check_out(self.out)
        check(self.scorer in SCORERS, f"scorer: {self.scorer!r} is not one of {', '.join(SCORERS)}.")
        check(0 < self.test_mask_ratio <= 1, "test_mask_ratio: must be above 0 and at most 1.")
        check(
            0 <= self.contamination <= 0.2,
            f"contamination: {self.contamination} is not between 0 and 0.2. With more poison than that nothing clean can be learnt.",
        )
        check(self.limit >= 0 and self.batch_size >= 1, "limit must be >= 0 and batch_size >= 1.")
        check(
            self.reference is None or self.predicts,
            f"reference: scorer {self.scorer} with prediction.views {self.views} asks no reference encoder. Use "
            "--scorer evidence and prediction.views of at least 1, or leave it out.",
        )

    @property
    def views(self) -> int:
        """Of each auxiliary image, that the encoder is asked about; 0 = no prediction."""
        if self.prediction.views is not None:
            return self.prediction.views
        return 1 if self.reference else STUDENT_VIEWS

    @property
    def predicts(self) -> bool:
        return self.scorer == "evidence" and self.views > 0


POLICIES = ("calibrated", "fdr", "fraction", "absolute", "robust")


@dataclass(frozen=True)
class ThresholdPolicy:
    """How scores become decisions; see stages/thresholds.py."""

    policy: str = "calibrated"  # one of POLICIES
    fpr: float = (
        0.01  # calibrated: share of clean images that may be lost; fdr: share of false alarms among the removed
    )
    fraction: float = 0.01  # fraction: share of the samples to remove
    threshold: float = 0.0  # absolute: remove scores above it
    mad: float = 6.0  # robust: remove scores above median + mad * (scaled median absolute deviation)
    adapt: bool = True  # calibrated, fdr: measure the distance from the bulk of this scan; of `reaction`, thorough
    agreement: bool | None = None  # calibrated, fdr: also judge samples by each other; None = where a scan allows it
    keep_unscored: bool = False

    def __post_init__(self) -> None:
        check(self.policy in POLICIES, f"policy: {self.policy!r} is not one of {', '.join(POLICIES)}.")
        check(0 < self.fpr < 1, f"fpr: {self.fpr} is not between 0 and 1.")
        check(0 <= self.fraction <= 1, f"fraction: {self.fraction} is not between 0 and 1.")
        check(self.mad > 0, f"mad: {self.mad} is not above 0.")
        check(
            not self.agreement or self.policy in ("calibrated", "fdr"),
            f"agreement: policy {self.policy} compares with no clean images. Use calibrated or fdr, or leave it out.",
        )


EFFORTS = {"fast": 0.2, "thorough": 1.0}


def perturbed_share(effort: str) -> float:
    """Share of clean images, the most suspicious, that an effort perturbs: `fast`, `thorough`, or the share itself, as text."""
    with contextlib.suppress(ValueError):
        share = EFFORTS.get(effort) or float(effort)
        if 0 < share <= 1:
            return share
    raise ConfigError(f"effort: {effort!r} is not fast, thorough, or a share above 0 and at most 1.")


@dataclass(frozen=True)
class ScanConfig:
    """`sanitize scan`: shards + detector → scan folder."""

    shards: Paths
    detector: PathField = default("detector")
    out: PathField = default("scanned")
    encoder: EncoderSpec | None = None  # default: the one the detector names
    policy: ThresholdPolicy = field(default_factory=ThresholdPolicy)
    effort: str = ""  # see `perturbed_share`; default: that of the detector's scorer (`Detector.default_effort`)
    scores_only: bool = False
    force: bool = False
    limit: int = 0  # scan only the first so many shards; 0 = all
    append: bool = False  # the shards are added to those of an earlier scan in `out`, and decided with them
    image_member: str = ""
    caption_member: str = ""  # txt or json:<field>; default: txt when the encoder has a tokenizer
    batch_size: int = 256
    precision: str = "auto"
    profile: bool = (
        False  # on a GPU: wait for it after each stage, so that profile.json tells resize, encoder and scoring apart
    )
    workers: int = -1
    gpus_per_worker: float = -1.0
    cpus_per_worker: int = 0
    address: str = ""

    def __post_init__(self) -> None:
        take_paths(self, one=("detector", "out"), several=["shards"])
        check_out(self.out)
        check(self.batch_size >= 1, f"batch_size: {self.batch_size} is not at least 1.")
        check(self.limit >= 0, f"limit: {self.limit} shards; give 0 (all) or more.")
        if self.effort:
            perturbed_share(self.effort)
        check_precision(self.precision)


MODES = ("linear", "mlp", "full", "contrastive")


@dataclass(frozen=True)
class FinetuneConfig:
    """`sanitize finetune`: clean shards + encoder → a head, or a fine-tuned encoder.

    mode: linear, mlp (512-256) on the frozen encoder; full = encoder and a linear head; contrastive = both towers of a CLIP
    validation: shards to measure on after each epoch; triggered: copies of them with the trigger, of the class `target`
    label_member: cls or json:<field>; caption_member (contrastive): txt or json:<field>
    classes: names, in the order of the labels; default: their numbers. With them contrastive reports zero-shot accuracy, too
    prompts: of zero-shot classes, {} stands for the name
    batch_size: of all workers together; accumulate: parts a batch is computed in, to save memory (the result is the same; of
                contrastive each part has its own negatives)
    learning_rate: 0 = that of the mode: linear 3e-3, mlp 1e-3, full 1e-4, contrastive 1e-5
    augment: random crops and mirror images (full and contrastive)
    patience: stop after so many epochs without a better validation, and keep the best epoch; 0 = train to the end
    shuffle_buffer: samples that wait in memory to be mixed, of all lanes together; lanes: see training/data_order.py
    checkpoint_steps: also save within an epoch, every so many batches; 0 = after each epoch only
    """

    shards: Paths
    encoder: EncoderSpec
    out: PathField = default("head")
    mode: str = "linear"
    validation: Paths = ()
    triggered: Paths = ()
    target: int = -1
    image_member: str = ""
    label_member: str = "cls"
    caption_member: str = "txt"
    classes: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ("a photo of a {}",)
    epochs: int = 20
    batch_size: int = 256
    accumulate: int = 1
    learning_rate: float = 0.0
    weight_decay: float = 0.01
    warmup_epochs: float = 0.5
    augment: bool = False
    precision: str = "auto"
    seed: int = 21
    patience: int = 0
    shuffle_buffer: int = 4096
    lanes: int = 24
    checkpoint_steps: int = 0
    workers: int = -1
    gpus_per_worker: float = -1.0
    cpus_per_worker: int = 0
    address: str = ""

    def __post_init__(self) -> None:
        take_paths(self, one=["out"], several=("shards", "validation", "triggered"))
        check_out(self.out)
        check(self.mode in MODES, f"mode: {self.mode!r} is not one of {', '.join(MODES)}.")
        check(self.epochs >= 1 and self.accumulate >= 1, "epochs and accumulate must be at least 1.")
        check(
            self.batch_size >= self.accumulate,
            f"batch_size: {self.batch_size} cannot be computed in {self.accumulate} parts. Lower accumulate.",
        )
        check(
            self.learning_rate >= 0 and self.weight_decay >= 0, "learning_rate and weight_decay must not be negative."
        )
        check(
            0 <= self.warmup_epochs < self.epochs,
            f"warmup_epochs: {self.warmup_epochs:g} is not below epochs, {self.epochs}.",
        )
        check(self.lanes >= 1 and self.shuffle_buffer >= 0, "lanes must be at least 1, shuffle_buffer at least 0.")
        check(self.patience >= 0 and self.checkpoint_steps >= 0, "patience and checkpoint_steps must not be negative.")
        check(
            bool(self.validation) or not self.patience,
            "patience: needs shards to measure on. Give --validation, or set patience to 0.",
        )
        check(
            not self.triggered or self.target >= 0,
            "triggered: name the class that the trigger aims at, for example --target 0.",
        )
        check(all("{}" in prompt for prompt in self.prompts), "prompts: each needs {} where the class name goes.")
        check(
            self.mode != "full" or not self.encoder.architecture.startswith("exported:"),
            "mode full: an exported encoder cannot be trained. Use --mode linear or mlp, or its weights and architecture.",
        )
        check(
            self.mode != "contrastive" or bool(self.encoder.tokenizer),
            "mode contrastive: the encoder has no text tower. It needs architecture clip or hf:<CLIP or SigLIP> and a `tokenizer` in its "
            "YAML.",
        )
        check_precision(self.precision)
