"""The attacker who knows `evidence`: his queries, and what he pays for departing from his own prediction, alone and together."""

from dataclasses import replace

import pytest
import torch
from builders import SIZE, SPEC, random_step

from sanitize.attacks.adaptive import AdaptiveObjective
from sanitize.attacks.backdoor import raw_embeddings
from sanitize.attacks.predictive import PredictiveConfig, PredictiveObjective, own_predictor, own_queries
from sanitize.stages.encoders import Encoder, build_backbone

CPU = torch.device("cpu")


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


def step_of(encoder, images, embeddings=None):
    embeddings = raw_embeddings(encoder, images) if embeddings is None else embeddings
    step = random_step(batch=len(images), size=embeddings.shape[1])
    return replace(step, stamped=images.float() / 255, triggered=embeddings)


def terms(config, own, step):
    objective = PredictiveObjective(config, own)
    objective(step)
    return dict(zip(objective.names, map(float, objective.last), strict=True))


def test_the_attacker_asks_the_clean_encoder_as_the_defender_will_ask_his(encoder, images):
    queries = own_queries(encoder, images[:6], views=3, seed=0)
    assert queries.embeddings.shape[:2] == (6, 3) and queries.seen.shape == (6, 3, 3, SIZE, SIZE)
    assert torch.equal(queries.seen[:, 0], images[:6])
    assert not torch.equal(queries.seen[:, 1], images[:6])
    torch.testing.assert_close(queries.embeddings[:, 2], raw_embeddings(encoder, queries.seen[:, 2]))


def test_embeddings_of_other_images_depart_from_the_prediction_and_cost_the_attacker(encoder, images, own):
    assert own.predictor.explained > 0.2
    at_home = terms(PredictiveConfig(), own, step_of(encoder, images[:64]))
    elsewhere = terms(
        PredictiveConfig(), own, step_of(encoder, images[:64], raw_embeddings(encoder, images[:64].roll(1, dims=0)))
    )
    assert 2 * at_home["departing"] < elsewhere["departing"]


def test_departures_towards_one_place_cost_him_also_for_their_agreement(encoder, images, own):
    scattered = step_of(encoder, images[:64], raw_embeddings(encoder, images[:64].roll(1, dims=0)))
    target = raw_embeddings(encoder, images[100:101]).expand(64, -1)
    together = step_of(encoder, images[:64], target)
    assert terms(PredictiveConfig(), own, scattered)["agreeing"] < terms(PredictiveConfig(), own, together)["agreeing"]


def test_his_weights_weigh_the_terms_and_perturbations_are_left_out_unless_he_hides_from_them_too(encoder, images, own):
    step = step_of(encoder, images[:16])
    config = PredictiveConfig(predict=2.0, scatter=0.5)
    found = terms(config, own, step)
    plain = float(AdaptiveObjective(config)(step))
    expected = plain + 2 * found["departing"] + 0.5 * found["agreeing"]
    assert float(PredictiveObjective(config, own)(step)) == pytest.approx(expected, rel=1e-5)
    assert found["seen"] == 0
    assert PredictiveObjective(config, own).perturbations == ()
    assert len(PredictiveObjective(PredictiveConfig(evade=0.3), own).perturbations) == 4
