"""detector.json: what a detector was fitted to and with, in plain values."""

from dataclasses import dataclass

from sanitize.artifacts.predictor_tensors import PredictorShape
from sanitize.config import SCORERS, EncoderSpec
from sanitize.config_models import DecoderConfig
from sanitize.errors import check


@dataclass(frozen=True)
class FitSummary:
    """Training and calibration in numbers, for people. calibration_score_quantiles: quantile as text → score.

    prediction_explained: R² of the predictor on images it never saw; null without one. A low one is worth little weight in the score.
    prediction_crowded: share of benignly changed images whose embeddings crowd one place, a mark of a backdoor that benign changes trigger
    """

    training_images: int
    calibration_images: int
    epochs: int
    loss_by_epoch: tuple[float, ...]
    calibration_score_quantiles: dict[str, float]
    prediction_explained: float | None = None
    prediction_crowded: float | None = None


@dataclass(frozen=True)
class Description:
    """detector.json. sha256: of the other files."""

    format_version: int
    decode_path: str
    encoder: EncoderSpec
    encoder_fingerprint: str
    decoder: DecoderConfig
    embedding_size: int
    scorer: str
    mask_ratio: float
    seed: int
    summary: FitSummary
    versions: dict[str, str]
    sha256: dict[str, str]
    predictor: PredictorShape | None = None
    reference: EncoderSpec | None = None
    reference_fingerprint: str = ""

    def __post_init__(self) -> None:
        check(self.scorer in SCORERS, f"scorer: {self.scorer!r} is not one of {', '.join(SCORERS)}.")
        check(0 <= self.mask_ratio <= 1, f"mask_ratio: {self.mask_ratio} is not between 0 and 1.")
        check(0 < self.embedding_size < 1 << 20, f"embedding_size: {self.embedding_size} is not between 1 and 2^20.")
        check(0 <= self.seed < 1 << 63, f"seed: {self.seed} is not between 0 and 2^63.")
