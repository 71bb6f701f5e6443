"""One attacker for all that is known of the detectors (our own; no paper): he chooses what he hides from, and by how much.

A step up from adaptive.py and predictive.py, whose penalties he may combine: perturbations drawn anew at every step in place of the fixed
ones, a decoder of his own (stages/decoder.py), and a trigger that is optimised so that predictors expect the target (optimised_trigger.py).
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from sanitize.attacks.adaptive import AdaptiveConfig, HidingObjective, Penalty, Perturbation, Reactions
from sanitize.attacks.backdoor import Step, fine_tune, raw_embeddings
from sanitize.attacks.optimised_trigger import TriggerSearch, optimise_trigger
from sanitize.attacks.predictive import OwnPredictor, PredictiveConfig, Usual, kept_out, own_predictor
from sanitize.attacks.triggers import Trigger
from sanitize.config_models import DecoderConfig
from sanitize.errors import check
from sanitize.stages.decoder import Decoder
from sanitize.stages.encoders import Encoder
from sanitize.stages.perturbations import PERTURBATIONS, blur, coarse, turn
from sanitize.stages.scoring import normalised
from sanitize.training.split import shuffled_batches

DECODER_EPOCHS, DECODER_BATCH, DECODER_RATE = 10, 64, 1e-3


@dataclass(frozen=True)
class InformedConfig(PredictiveConfig):
    """evade, predict, scatter, decode: weights of hiding from reactions to perturbations, from a predictor, from agreement among departures
    and from a decoder, 0 = not at all. drawn: perturbations are drawn at every step; optimise: the trigger is."""

    predict: float = 0.0
    scatter: float = 0.0
    decode: float = 0.0
    drawn: bool = False
    optimise: TriggerSearch | None = None

    def __post_init__(self) -> None:
        check(self.evade > 0 or not self.drawn, "informed.drawn: needs a weight `evade` above 0.")

    @classmethod
    def of(cls, config: AdaptiveConfig) -> "InformedConfig":
        """The attacker of adaptive.py or predictive.py as one of these."""
        if isinstance(config, cls):
            return config
        return cls(**asdict(config))

    @property
    def asks_a_predictor(self) -> bool:
        return bool(self.predict or self.scatter or self.optimise)


# ---------------------------------------------------------------- perturbations drawn anew


def drawn_perturbations(seed: int) -> tuple[Perturbation, ...]:
    """As PERTURBATIONS, in their order, but every call draws half to one and a half times their strength, the pattern and the direction."""
    rng = np.random.default_rng(seed)

    def noisy(images: Tensor) -> Tensor:
        pattern = rng.normal(0, rng.uniform(4, 12) / 255, (1, *images.shape[1:])).astype(np.float32)
        return (images + torch.from_numpy(pattern).to(images.device)).clamp(0, 1)

    def partly(perturb: Perturbation) -> Perturbation:
        return lambda images: (images + rng.uniform(0.5, 1.5) * (perturb(images) - images)).clamp(0, 1)

    def turned(images: Tensor) -> Tensor:
        return turn(images, float(rng.choice([-1, 1]) * rng.uniform(4, 12)))

    drawn = {"noise": noisy, "blur": partly(blur), "coarse": partly(coarse), "turn": turned}
    return tuple(drawn[name] for name in PERTURBATIONS)


# ---------------------------------------------------------------- a decoder of his own


class OwnDecoder:
    """decoded: excess of the error with which an embedding decodes to its image (`lowres`). usual: error of clean images."""

    perturbations: tuple[Perturbation, ...] = ()

    def __init__(self, decoder: Decoder, clean_encoder: Encoder) -> None:
        self.decoder = decoder
        self.clean_encoder = clean_encoder  # for its mean and deviation of pixels
        self.usual = Usual(0.0, 1.0)

    def errors(self, embeddings: Tensor, images: Tensor) -> Tensor:
        """(B,) mean squared error, normalised units. embeddings (B, D), images (B, 3, S, S) float32 in [0, 1]."""
        targets = normalised(images, self.clean_encoder, self.decoder.config.image_size)
        squared: Tensor = (self.decoder(embeddings.float()) - targets).square()
        return squared.mean(dim=(1, 2, 3))

    def __call__(self, step: Step) -> dict[str, Tensor]:
        return {"decoded": self.usual.excess(self.errors(step.triggered, step.stamped))}


def own_decoder(clean_encoder: Encoder, shadow: Tensor, seed: int, device: torch.device) -> OwnDecoder:
    """Trained on clean embeddings of shadow (N, 3, S, S) uint8 with no patch visible; a fifth tells what errors are usual."""
    embeddings = raw_embeddings(clean_encoder, shadow)
    learning, judging = kept_out(len(shadow), seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = Decoder(DecoderConfig(), embeddings.shape[1]).to(device)
    decoder.embedding_mean.copy_(embeddings[learning].mean(dim=0))
    decoder.embedding_scale.copy_(embeddings[learning].std(dim=0).clamp(min=1e-6))
    own = OwnDecoder(decoder, clean_encoder)
    optimizer = torch.optim.Adam(decoder.parameters(), DECODER_RATE)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(DECODER_EPOCHS):
        for batch in shuffled_batches(len(learning), min(DECODER_BATCH, len(learning)), generator):
            rows = learning[batch]
            loss = own.errors(embeddings[rows].to(device), shadow[rows].to(device).float() / 255).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    decoder.eval().requires_grad_(False)
    parts = [(embeddings[rows].to(device), shadow[rows].to(device).float() / 255) for rows in judging.split(512)]
    own.usual = Usual.of(torch.cat([own.errors(*part) for part in parts]))
    return own


# ---------------------------------------------------------------- the attack


def penalties(
    config: InformedConfig,
    clean_encoder: Encoder,
    shadow: Tensor,
    predictor: OwnPredictor | None,
    seed: int,
    device: torch.device,
) -> list[Penalty]:
    """Those that weigh anything, in the order in which attackers learn of them."""
    chosen: list[Penalty] = []
    if config.evade:
        chosen.append(Reactions(drawn_perturbations(seed), momentum=0) if config.drawn else Reactions())
    if config.decode:
        chosen.append(own_decoder(clean_encoder, shadow, seed, device))
    if predictor and (config.predict or config.scatter):
        chosen.append(predictor)
    return chosen


def attack(
    clean_encoder: Encoder,
    shadow: Tensor,
    references: Tensor,
    trigger: Trigger,
    config: AdaptiveConfig,
    seed: int,
    device: torch.device,
) -> tuple[Encoder, Trigger]:
    """shadow (N, 3, S, S) and references (R, 3, S, S) uint8, at the encoder's size → backdoored encoder, eval mode, and its trigger:
    `trigger` itself, or the optimised one of its shape."""
    clean_encoder.eval().to(device)
    known = InformedConfig.of(config)
    predictor = own_predictor(clean_encoder, shadow, seed, device) if known.asks_a_predictor else None
    if known.optimise and predictor:
        target = raw_embeddings(clean_encoder, references).mean(dim=0)
        trigger = optimise_trigger(predictor.predictor, target, shadow, trigger, known.optimise, seed, device)
    weights = {"seen": known.evade, "decoded": known.decode, "departing": known.predict, "agreeing": known.scatter}
    objective = HidingObjective(known, penalties(known, clean_encoder, shadow, predictor, seed, device), weights)
    return fine_tune(clean_encoder, shadow, references, trigger, objective, known, seed, device), trigger
