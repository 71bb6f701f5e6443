"""Settings of the models that `fit` trains: the decoder and the predictor."""

from dataclasses import dataclass

from sanitize.errors import check


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of the DeDe decoder (Hou et al., CVPR 2025, arXiv 2411.16154; reference code, src/decoder_model.py).

    image_size: side of the image it reconstructs, in pixels; patch_size divides it
    width, heads, encoder_depth, decoder_depth: of the transformer blocks
    standardize_embedding: centre and scale embeddings by their statistics on the auxiliary set; the paper feeds them raw
    """

    image_size: int = 8
    patch_size: int = 2
    width: int = 128
    heads: int = 4
    encoder_depth: int = 2
    decoder_depth: int = 2
    standardize_embedding: bool = True

    def __post_init__(self) -> None:
        check(1 <= self.image_size <= 4096, f"decoder.image_size: {self.image_size} is not between 1 and 4096 pixels.")
        check(1 <= self.width <= 16384, f"decoder.width: {self.width} is not between 1 and 16384.")
        check(
            self.patch_size >= 1 and self.image_size % self.patch_size == 0,
            f"decoder.patch_size: {self.patch_size} does not divide decoder.image_size {self.image_size}.",
        )
        check(
            self.heads >= 1 and self.width % self.heads == 0,
            f"decoder.heads: {self.heads} does not divide decoder.width {self.width}.",
        )
        check(
            0 <= self.encoder_depth <= 256 and 1 <= self.decoder_depth <= 256,
            "decoder depths: encoder 0 to 256, decoder 1 to 256.",
        )


STUDENT_VIEWS = 5


@dataclass(frozen=True)
class PredictionConfig:
    """How the embedding of an image is predicted; see stages/prediction.py.

    views: of each auxiliary image, the plain one and benign changes, that the encoder is asked about; 0 = no prediction. Default:
           STUDENT_VIEWS; with a reference encoder the plain one alone, since it need not be taught about odd images
    images: at most so many to learn from; components: of the embedding, that are predicted
    width, epochs, batch_size, learning_rate: of the student; a reference encoder needs none
    """

    views: int | None = None
    images: int = 4000
    components: int = 48
    width: int = 16
    epochs: int = 5
    batch_size: int = 128
    learning_rate: float = 4e-3

    def __post_init__(self) -> None:
        views = f"prediction.views: {self.views} is not between 0 (no prediction) and 100."
        check(self.views is None or 0 <= self.views <= 100, views)
        check(self.images >= 1 and self.epochs >= 1, "prediction.images and prediction.epochs must be at least 1.")
        check(1 <= self.components <= 4096, f"prediction.components: {self.components} is not between 1 and 4096.")
        check(1 <= self.width <= 1024, f"prediction.width: {self.width} is not between 1 and 1024.")
        check(self.batch_size >= 2, f"prediction.batch_size: {self.batch_size} is not at least 2.")
        check(self.learning_rate > 0, f"prediction.learning_rate: {self.learning_rate} is not above 0.")
