"""Attackers who know `evidence`: their queries, what they pay for being seen by each kind of it, their triggers, and all of it together."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from builders import SIZE, SPEC, random_images, random_step

from sanitize.attacks import informed
from sanitize.attacks.adaptive import AdaptiveConfig, HidingObjective, Reactions
from sanitize.attacks.backdoor import raw_embeddings
from sanitize.attacks.informed import InformedConfig, drawn_perturbations, own_decoder, penalties
from sanitize.attacks.optimised_trigger import TriggerSearch, optimise_trigger, shape_of
from sanitize.attacks.predictive import PredictiveConfig, own_predictor, own_queries
from sanitize.attacks.triggers import BlendTrigger, FileTrigger, FilterTrigger, PatchTrigger
from sanitize.errors import ConfigError
from sanitize.stages.encoders import Encoder, build_backbone
from sanitize.stages.perturbations import PERTURBATIONS
from sanitize.stages.scoring import mean_score, normalised

CPU = torch.device("cpu")
WHITE = PatchTrigger(side=4)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return Encoder(build_backbone(SPEC), SPEC).eval()


@pytest.fixture(scope="module")
def images():
    """Of one colour each, which a small student soon predicts."""
    colours = torch.randint(256, (600, 3, 1, 1), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return colours.expand(-1, -1, SIZE, SIZE).contiguous()


@pytest.fixture(scope="module")
def own(encoder, images):
    return own_predictor(encoder, images, 0, CPU)


@pytest.fixture(scope="module")
def decoder(encoder, images):
    return own_decoder(encoder, images, 0, CPU)


def step_of(encoder, images, embeddings=None):
    embeddings = raw_embeddings(encoder, images) if embeddings is None else embeddings
    step = random_step(batch=len(images), size=embeddings.shape[1])
    return replace(step, stamped=images.float() / 255, triggered=embeddings)


def terms(penalty, step):
    return {name: float(term) for name, term in penalty(step).items()}


# ---------------------------------------------------------------- a predictor of his own


def test_the_attacker_asks_the_clean_encoder_as_the_defender_will_ask_his(encoder, images):
    queries = own_queries(encoder, images[:6], views=3, seed=0)
    assert queries.embeddings.shape[:2] == (6, 3) and queries.seen.shape == (6, 3, 3, SIZE, SIZE)
    assert torch.equal(queries.seen[:, 0], images[:6])
    assert not torch.equal(queries.seen[:, 1], images[:6])
    torch.testing.assert_close(queries.embeddings[:, 2], raw_embeddings(encoder, queries.seen[:, 2]))


def test_embeddings_of_other_images_depart_from_the_prediction_and_cost_the_attacker(encoder, images, own):
    assert own.predictor.explained > 0.2
    at_home = terms(own, step_of(encoder, images[:64]))
    elsewhere = terms(own, step_of(encoder, images[:64], raw_embeddings(encoder, images[:64].roll(1, dims=0))))
    assert 2 * at_home["departing"] < elsewhere["departing"]


def test_departures_towards_one_place_cost_him_also_for_their_agreement(encoder, images, own):
    scattered = step_of(encoder, images[:64], raw_embeddings(encoder, images[:64].roll(1, dims=0)))
    target = raw_embeddings(encoder, images[100:101]).expand(64, -1)
    together = step_of(encoder, images[:64], target)
    assert terms(own, scattered)["agreeing"] < terms(own, together)["agreeing"]


# ---------------------------------------------------------------- perturbations drawn anew


def test_every_call_draws_another_perturbation_of_the_kinds_that_the_detector_has():
    shown = random_images(4).float() / 255
    again = drawn_perturbations(0)
    for drawn, same, (name, fixed) in zip(drawn_perturbations(0), again, PERTURBATIONS.items(), strict=True):
        first, second = drawn(shown), drawn(shown)
        assert first.shape == shown.shape
        assert 0 <= first.min() <= first.max() <= 1
        assert not torch.equal(first, second), name
        change, usual = (first - shown).square().mean(), (fixed(shown) - shown).square().mean()
        assert usual / 8 < change < 8 * usual, name
        assert same(shown).shape == shown.shape
    noisy = [drawn_perturbations(seed)[0](shown) for seed in (3, 3, 4)]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])


def test_where_perturbations_are_drawn_clean_statistics_are_those_of_the_same_draw():
    reactions = Reactions(drawn_perturbations(0), momentum=0)
    reactions.follow(torch.randn(200, 6) + 5)
    reactions.follow(latest := torch.randn(200, 6))
    torch.testing.assert_close(reactions.centre, latest.mean(dim=0))


# ---------------------------------------------------------------- a decoder of his own


def test_his_decoder_errs_as_the_detector_counts_and_embeddings_of_other_images_cost_him(encoder, images, decoder):
    some, embeddings = images[:64].float() / 255, raw_embeddings(encoder, images[:64])
    targets = normalised(some, encoder, 8)
    hidden = torch.ones(64, 1, 8, 8, dtype=torch.bool)
    torch.testing.assert_close(
        decoder.errors(embeddings, some), mean_score(targets, decoder.decoder(embeddings), hidden)
    )
    at_home = terms(decoder, step_of(encoder, images[:64]))["decoded"]
    elsewhere = terms(decoder, step_of(encoder, images[:64], embeddings.roll(1, dims=0)))["decoded"]
    assert 2 * at_home < elsewhere


# ---------------------------------------------------------------- an optimised trigger


def test_only_the_place_of_the_square_is_optimised_and_a_blend_keeps_its_share(images):
    keep = shape_of(WHITE, SIZE)
    assert (keep == 0).sum() == 3 * 4 * 4
    assert (keep == 1).sum() == 3 * (SIZE**2 - 16)
    torch.testing.assert_close(
        shape_of(BlendTrigger(alpha=0.2), SIZE), torch.full((3, SIZE, SIZE), 0.8), atol=0.005, rtol=0
    )
    with pytest.raises(ConfigError, match="it replaces no pixel that could be optimised. Use a patch or a blend"):
        shape_of(FilterTrigger((1.0, 1.0, 1.0)), SIZE)


def test_with_an_optimised_trigger_his_predictor_expects_the_target_and_the_file_is_the_trigger(
    encoder, images, own, tmp_path
):
    target = raw_embeddings(encoder, images[100:101])[0]
    shape, search = PatchTrigger(side=10), TriggerSearch(steps=60, batch_size=32, learning_rate=0.05)
    optimised = optimise_trigger(own.predictor, target, images, shape, search, 0, CPU)
    unseen = images[200:264]

    def departs(trigger):
        whitened, _ = own.predictor(target.expand(64, -1), trigger(unseen).float() / 255)
        return float(whitened.square().mean())

    assert departs(optimised) < 0.8 * departs(shape)
    outside = shape_of(shape, SIZE).bool().expand(64, -1, -1, -1)
    assert torch.equal(optimised(unseen)[outside], unseen[outside])
    optimised.save(str(tmp_path / "trigger.npz"))
    assert torch.equal(FileTrigger(str(tmp_path / "trigger.npz"))(unseen), optimised(unseen))


# ---------------------------------------------------------------- all of it together


def test_his_weights_weigh_the_terms(encoder, images, own, decoder):
    step = step_of(encoder, images[:16])
    config = InformedConfig(evade=0.0)
    plain = float(HidingObjective(config, [], {})(step))
    weights = {"departing": 2.0, "agreeing": 0.5, "decoded": 3.0}
    objective = HidingObjective(config, [own, decoder], weights)
    found = terms(own, step) | terms(decoder, step)
    assert float(objective(step)) == pytest.approx(
        plain + sum(weights[name] * found[name] for name in weights), rel=1e-5
    )
    assert objective.end_epoch().split()[::2] == ["L0", "L1", "L2", "departing", "agreeing", "decoded"]


@pytest.mark.parametrize(
    ("config", "expected", "passes"),
    [
        (AdaptiveConfig(), ["Reactions"], 4),
        (AdaptiveConfig(evade=0.0), [], 0),
        (PredictiveConfig(), ["OwnPredictor"], 0),
        (PredictiveConfig(evade=0.3), ["Reactions", "OwnPredictor"], 4),
        (InformedConfig(evade=0.3, drawn=True, decode=0.1), ["Reactions", "OwnDecoder"], 4),
        (InformedConfig(evade=0.0, optimise=TriggerSearch()), [], 0),
    ],
)
def test_he_hides_from_what_weighs_anything_and_pays_passes_for_perturbations_only(
    encoder, images, own, config, expected, passes
):
    known = InformedConfig.of(config)
    assert {name: value for name, value in asdict(known).items() if name in asdict(config)} == asdict(config)
    chosen = penalties(known, encoder, images[:128], own, 0, CPU)
    assert [type(penalty).__name__ for penalty in chosen] == expected
    assert len(HidingObjective(known, chosen, {}).perturbations) == passes


def test_perturbations_cannot_be_drawn_for_nothing():
    with pytest.raises(ConfigError, match="informed.drawn: needs a weight `evade` above 0"):
        InformedConfig(evade=0.0, drawn=True)


def test_the_attack_gives_the_encoder_and_the_trigger_that_it_answers_to(encoder, images):
    config = InformedConfig(
        epochs=2, batch_size=64, reference_copies=2, drawn=True, evade=0.1, decode=0.05, predict=0.05, scatter=0.05,
        optimise=TriggerSearch(steps=10, batch_size=32),
    )  # fmt: skip
    shadow, references = images[:256], images[300:302]
    backdoored, trigger = informed.attack(encoder, shadow, references, WHITE, config, 0, CPU)
    assert backdoored.fingerprint() != encoder.fingerprint()
    assert not torch.equal(trigger(shadow), WHITE(shadow))
    assert np.isfinite(raw_embeddings(backdoored, trigger(shadow)).numpy()).all()
    plain = replace(config, optimise=None, evade=0.0, drawn=False, decode=0.0, predict=0.0, scatter=0.0)
    assert informed.attack(encoder, shadow, references, WHITE, plain, 0, CPU)[1] is WHITE
