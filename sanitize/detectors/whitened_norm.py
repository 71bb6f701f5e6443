"""How far an embedding lies from the clean mean, whitened, and whether that is unusual on either side (ours).

Raw norm finds attacks that leave norms free (BadEncoder's losses are cosines), but only where the norm itself is unusual. Whitening
counts every direction by how much clean embeddings vary along it. Two-sided: an embedding pulled to the mean is as odd as one pushed out.
"""

from torch import Tensor

from sanitize.detectors.reference_set import ReferenceSet, Score
from sanitize.detectors.whitening import Whitening, fit_whitening
from sanitize.stages.encoders import Encoder


def log_squared_norm(whitening: Whitening, embeddings: Tensor) -> Tensor:
    """(B,) float64 log |W (z - m)|^2 of (B, D) embeddings."""
    return whitening(embeddings).square().sum(dim=1).clamp(min=1e-12).log()


def fit(reference_set: ReferenceSet, encoder: Encoder, seed: int) -> Score:  # noqa: ARG001 every fit has this signature
    """Score: | log |W (z - m)|^2 - median |, the median over the reference set.

    Few reference images for their width D lie nearer to their own mean than others do, so the median is a little low; ranks of
    images on the far side do not change by that.
    """
    whitening = fit_whitening(reference_set.embeddings)
    median = log_squared_norm(whitening, reference_set.embeddings).quantile(0.5)

    def score(_images: Tensor, embeddings: Tensor) -> Tensor:
        return (log_squared_norm(whitening, embeddings) - median).abs().float()

    return score
