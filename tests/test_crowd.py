"""Benign changes that trigger a backdoor send unlike images to one place; a predictor does not learn from them, and fit says so."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from builders import SPEC, fit_config, write_shards

from sanitize.commands.fit import fit
from sanitize.config import TrainingConfig
from sanitize.config_models import PredictionConfig
from sanitize.stages.encoders import build_backbone
from sanitize.training import crowd
from sanitize.training.crowd import find_crowd
from sanitize.training.prediction import fit_predictor
from sanitize.training.queries import Queries

SIZE = 6  # of a target


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unlike(count, seed=0):
    """Hashes (N, 8) of images of which no two look alike."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 8), dtype=np.uint8))


def views_of(count=500, views=4, spread=0.3):
    """Targets (N, V, SIZE): every image has a place of its own, its views lie around it."""
    return draws(count, 1, SIZE) + spread * draws(count, views, SIZE, seed=1)


def gathered(targets, chosen):
    """The chosen views (N, V) bool lie within a hundredth of one place."""
    place = torch.full((SIZE,), 1.5) + 0.01 * draws(*targets.shape, seed=2)
    return torch.where(chosen[..., None], place, targets)


def some_changed(count=500, views=4, share=0.1):
    chosen = torch.rand(count, views, generator=torch.Generator().manual_seed(3)) < share
    chosen[:, 0] = False
    return chosen


def test_changed_views_that_gather_are_a_crowd_and_the_others_are_not():
    chosen = some_changed()
    targets = gathered(views_of(), chosen)
    found = find_crowd(targets, unlike(500))
    assert found and found.share == pytest.approx(float(chosen[:, 1:].float().mean()), rel=0.1)
    held = found.holds(targets.flatten(0, 1)).unflatten(0, chosen.shape)
    assert held[chosen].all() and held[~chosen].float().mean() < 0.02


def test_few_images_or_few_of_them_that_gather_or_none_are_no_crowd():
    assert find_crowd(views_of(), unlike(500)) is None
    chosen = some_changed()
    chosen &= chosen.flatten().cumsum(0).unflatten(0, chosen.shape) <= crowd.NEIGHBOURS - 1
    assert find_crowd(gathered(views_of(), chosen), unlike(500)) is None
    assert find_crowd(gathered(views_of(8), some_changed(8, share=1)), unlike(8)) is None
    assert find_crowd(views_of(views=1), unlike(500)) is None


def test_a_class_whose_plain_images_lie_there_too_is_no_crowd():
    chosen = torch.zeros(500, 4, dtype=torch.bool)
    chosen[:60] = True
    assert find_crowd(gathered(views_of(), chosen), unlike(500)) is None


def test_copies_of_one_image_are_no_crowd():
    chosen = torch.zeros(500, 4, dtype=torch.bool)
    chosen[:60, 1:] = True
    hashes = unlike(500)
    assert find_crowd(gathered(views_of(), chosen), hashes) is not None
    hashes[:60] = hashes[0]
    assert find_crowd(gathered(views_of(), chosen), hashes) is None


def triggered_queries(count, seed, share):
    """Features, and embeddings that follow from them; a share of the changed views has the trigger, an unusual feature, and the target."""
    features = draws(count, 1, 12, seed=seed) + 0.2 * draws(count, 4, 12, seed=seed + 100)
    embeddings = features @ draws(12, 16, seed=7) + 0.05 * draws(count, 4, 16, seed=seed + 200)
    chosen = some_changed(count, share=share)
    features = torch.where(chosen[..., None], features * 0.1 + 3 * (torch.arange(12) % 2), features)
    embeddings = torch.where(chosen[..., None], torch.full((16,), 8.0) + 0.02 * embeddings, embeddings)
    return Queries(torch.zeros(count, 32, dtype=torch.uint8), unlike(count, seed), embeddings, features), chosen


@pytest.mark.parametrize(("outlying", "apart"), [(crowd.OUTLYING, True), (1e9, False)])
def test_what_changes_trigger_teaches_nothing_once_it_is_kept_apart(outlying, apart, monkeypatch):
    monkeypatch.setattr(crowd, "OUTLYING", outlying)
    (training, _), (held_out, _), (fresh, chosen) = (
        triggered_queries(n, n, s) for n, s in ((900, 0.1), (300, 0.1), (301, 0.5))
    )
    predictor, found = fit_predictor(training, held_out, PredictionConfig(components=8), 0, torch.device("cpu"))
    with torch.no_grad():
        _, energy = predictor(fresh.embeddings.flatten(0, 1), fresh.seen.flatten(0, 1))
    energy = energy.unflatten(0, chosen.shape)
    seen = float((energy[chosen] > energy[~chosen].quantile(0.99)).float().mean())
    assert (found is not None) == apart
    assert seen > 0.95 if apart else seen < 0.05


class TriggeredByNoise(torch.nn.Module):
    """Maps rough images, whatever they show, to one place."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images):
        rough = (images[..., 2:] - 2 * images[..., 1:-1] + images[..., :-2]).abs().mean(dim=(1, 2, 3))
        share = torch.sigmoid(100 * (rough - 0.3))[:, None]
        return (1 - share) * self.backbone(images) + share * torch.ones(1)


@pytest.fixture(scope="module")
def triggered_by_noise(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "e.pt2"
    torch.manual_seed(0)
    encoder, images = TriggeredByNoise(build_backbone(SPEC)).eval(), torch.randn(2, 3, 16, 16)
    torch.export.save(torch.export.export(encoder, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)), path)
    return dataclasses.replace(SPEC, architecture=f"exported:{path}")


def test_fit_says_that_benign_changes_seem_to_trigger_a_backdoor(triggered_by_noise, encoder_spec, tmp_path, caplog):
    shards = write_shards(tmp_path / "in", [300, 300], first_seed=20_000)
    settings = {
        "scorer": "evidence",
        "training": TrainingConfig(epochs=1, batch_size=64, precision="fp32", calibration_fraction=0.2),
        "prediction": PredictionConfig(epochs=1),
    }
    with caplog.at_level(logging.WARNING, "sanitize.training.prediction"):
        clean = fit(fit_config(shards, encoder_spec, tmp_path / "clean", **settings))
        assert clean.summary.prediction_crowded == 0 and "crowd" not in caplog.text
        found = fit(fit_config(shards, triggered_by_noise, tmp_path / "backdoored", **settings))
    crowded = found.summary.prediction_crowded
    assert crowded and 0.03 < crowded < 0.4
    assert f"{100 * crowded:.1f} % of the benignly changed images have embeddings that crowd one place" in caplog.text
    assert (
        "benign changes seem to trigger a backdoor. The predictor learns from the others; see `sanitize inspect`"
        in caplog.text
    )
