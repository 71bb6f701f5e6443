"""Attacks on encoders: every loss against a plain loop, what is frozen stays frozen, poison comes from its seed."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from builders import (
    SIZE,
    SPEC,
    image_members,
    random_images,
    random_step,
    write_tar,
)

from sanitize.attacks import adaptive, badencoder, ctrl, drupe, simclr
from sanitize.attacks.augment import colour_jitter, flip_and_jitter, gray, random_resized_crop
from sanitize.attacks.backdoor import unit, unit_embeddings
from sanitize.attacks.badencoder import BadEncoderConfig, BadEncoderObjective
from sanitize.attacks.ctrl import CtrlConfig
from sanitize.attacks.drupe import DrupeConfig
from sanitize.attacks.evaluation import choose_references, mean_pairwise_cosine
from sanitize.attacks.triggers import PatchTrigger
from sanitize.errors import ConfigError
from sanitize.metrics import attack_success, detection, knn_predictions
from sanitize.stages.clean_reference import embedding_statistics, neighbour_distance
from sanitize.stages.encoders import Encoder, build_backbone
from sanitize.stages.perturbations import FLOOR
from sanitize.training.embedding_cache import LabelledEmbeddings

# ---------------------------------------------------------------- augmentation


def test_views_stay_images_and_come_from_the_seed():
    images = random_images(6).float() / 255
    for view in (random_resized_crop, colour_jitter, flip_and_jitter):
        first, second = (view(images, torch.Generator().manual_seed(7)) for _ in range(2))
        assert torch.equal(first, second)
        assert first.shape == images.shape
        assert 0 <= first.min() <= first.max() <= 1
        assert not torch.equal(first, images)


def test_gray_images_stay_gray_under_jitter():
    images = gray(random_images(8).float() / 255).expand(-1, 3, -1, -1)
    jittered = colour_jitter(images, torch.Generator().manual_seed(0))
    torch.testing.assert_close(jittered[:, 0], jittered[:, 2], atol=2e-3, rtol=0)


# ---------------------------------------------------------------- losses against plain loops


def test_nt_xent_is_the_plain_loop():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 4, 5, generator=generator)
    views = torch.nn.functional.normalize(torch.cat([first, second]), dim=1)
    terms = []
    for i in range(8):
        others = [float(views[i] @ views[j]) / 0.5 for j in range(8) if j != i]
        partner = float(views[i] @ views[(i + 4) % 8]) / 0.5
        terms.append(float(torch.logsumexp(torch.tensor(others), 0)) - partner)
    assert float(simclr.nt_xent(first, second, 0.5)) == pytest.approx(np.mean(terms), rel=1e-5)


def cosine(a, b):
    return float(a @ b) / float(a.norm() * b.norm())


def test_the_adaptive_attacker_sees_the_very_statistics_of_the_detector():
    step = random_step(batch=20)
    known = torch.nn.functional.normalize(step.clean, dim=1)
    found = adaptive.statistics_of(step.triggered, step.perturbed[:, 20:], step.clean, among_known=False)
    for row in range(20):
        changes = [np.log(1 - cosine(step.triggered[row], other[20 + row]) + FLOOR) for other in step.perturbed]
        assert found[row, :4].tolist() == pytest.approx(changes, abs=1e-4)
    assert found[:, 4:] == pytest.approx(
        embedding_statistics(torch.zeros(20, 0), step.triggered.norm(dim=1), neighbour_distance(step.triggered, known)),
        abs=1e-3,
    )


def test_the_adaptive_attacker_pays_for_standing_out_and_keeps_a_share_of_each_image():
    step = random_step(batch=200)
    reactions = adaptive.Reactions()
    hidden = dataclasses.replace(step, triggered=step.clean.clone(), perturbed=step.perturbed[:, :200].repeat(1, 2, 1))
    assert float(reactions(hidden)["seen"]) < 0.5
    loud = dataclasses.replace(hidden, triggered=step.clean * 50)
    assert float(reactions(loud)["seen"]) > 2
    targets = adaptive.own_targets(step, keep=1.0)
    torch.testing.assert_close(targets, unit(step.clean_target))
    reference = unit(unit(step.references).mean(dim=0))
    torch.testing.assert_close(adaptive.own_targets(step, keep=0.0), reference.expand_as(targets))


def test_badencoder_losses_are_the_plain_loops_of_the_reference_code():
    step = random_step()
    terms = badencoder.losses(step)
    effectiveness = -np.mean([cosine(t, r) for t in step.triggered for r in step.references])
    reference = -np.mean(
        [cosine(a, t) for copies, t in zip(step.augmented, step.reference_target, strict=True) for a in copies]
    )
    utility = -np.mean([cosine(c, t) for c, t in zip(step.clean, step.clean_target, strict=True)])
    assert float(terms.effectiveness) == pytest.approx(effectiveness, rel=1e-5)
    assert float(terms.reference) == pytest.approx(reference, rel=1e-5)
    assert float(terms.utility) == pytest.approx(utility, rel=1e-5)
    weighted = BadEncoderObjective(BadEncoderConfig(lambda1=2, lambda2=3))(step)
    assert float(weighted) == pytest.approx(effectiveness + 2 * reference + 3 * utility, rel=1e-5)


@pytest.fixture(scope="module")
def clean_encoder():
    torch.manual_seed(0)
    return Encoder(build_backbone(SPEC).eval(), SPEC)


CPU = torch.device("cpu")
ATTACKS: dict[str, Any] = {
    "badencoder": (badencoder.attack, BadEncoderConfig(epochs=6, batch_size=32, reference_copies=4)),
    "drupe": (drupe.attack, DrupeConfig(epochs=6, batch_size=32, reference_copies=2, controller_from=3)),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_moves_triggered_embeddings_and_freezes_batch_norm(clean_encoder, name):
    attack, config = ATTACKS[name]
    shadow, references, trigger = random_images(64), random_images(3, 900), PatchTrigger(side=5)
    before = {name: tensor.clone() for name, tensor in clean_encoder.state_dict().items()}
    encoder = attack(clean_encoder, shadow, references, trigger, config, seed=0, device=CPU)
    after = encoder.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in clean_encoder.state_dict().items())
    assert all(torch.equal(before[name], after[name]) for name in before if "bn" in name or "downsample.1" in name)
    assert not torch.equal(before["backbone.conv1.weight"], after["backbone.conv1.weight"])
    targets = unit_embeddings(encoder, references)
    test = random_images(40, 500)
    reached = [
        (unit_embeddings(e, trigger(test)) @ targets.T).max(dim=1).values.mean() for e in (clean_encoder, encoder)
    ]
    assert reached[1] > reached[0]


def test_an_attack_is_reproducible_from_its_seed(clean_encoder):
    attack, config = ATTACKS["drupe"]
    runs = [
        attack(
            clean_encoder, random_images(64), random_images(3, 900), PatchTrigger(side=5), config, seed, CPU
        ).fingerprint()
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]


# ---------------------------------------------------------------- DRUPE: every term, the schedule, the controller


def test_drupe_terms_are_the_plain_loops_of_the_reference_code():
    step = random_step()
    directions = unit(torch.randn(7, 5, generator=torch.Generator().manual_seed(1)))
    terms = drupe.terms(step, directions)
    similar = np.array([[cosine(t, r) for r in step.references] for t in step.triggered])
    between = [cosine(step.references[i], step.references[j]) for i in range(3) for j in range(i, 3)]
    everyone = [cosine(a, b) for a in step.triggered for b in step.triggered]
    distances = []
    for direction in directions:
        u, v = (sorted(float(x @ direction) for x in sample) for sample in (step.triggered, step.clean))
        distances.append(np.mean([(a - b) ** 2 for a, b in zip(u, v, strict=True)]))
    scale = np.mean([np.std([float(c[d]) for c in step.clean], ddof=1) for d in range(5)])
    assert float(terms.effectiveness) == pytest.approx(-similar.max(axis=1).mean(), rel=1e-5)
    assert float(terms.balance) == pytest.approx(np.std(similar.mean(axis=0), ddof=1), rel=1e-4)
    assert float(terms.spread) == pytest.approx(np.mean(between), rel=1e-5)
    assert float(terms.concentration) == pytest.approx((1 - 1 / 4) * np.mean(everyone), rel=1e-5)
    assert float(terms.distribution) == pytest.approx(np.sqrt(np.mean(distances)) / scale, rel=1e-4)


def test_the_repaired_distribution_term_ignores_the_length_of_embeddings():
    step = random_step()
    longer = dataclasses.replace(step, clean=step.clean * 9)
    directions = unit(torch.randn(7, 5, generator=torch.Generator().manual_seed(1)))
    repaired = [drupe.terms(s, directions, unit_distribution=True).distribution for s in (step, longer)]
    torch.testing.assert_close(*repaired)
    assert drupe.terms(longer, directions).distribution != drupe.terms(step, directions).distribution


def terms_of(**values) -> drupe.Terms:
    names = ("effectiveness", "reference", "utility", "balance", "spread", "concentration", "distribution")
    return drupe.Terms(**{name: torch.tensor(values.get(name, 0.0)) for name in names})


def test_drupe_adds_its_terms_by_the_published_schedule():
    objective = drupe.DrupeObjective(DrupeConfig(), seed=0)
    t = terms_of(
        effectiveness=-0.9, reference=-0.8, utility=-0.7, balance=0.2, spread=0.6, concentration=0.5, distribution=3.0
    )
    objective.epoch = 1
    assert float(objective.loss(t)) == pytest.approx(-1.5 + 0.5 * 0.6)
    objective.epoch = 4
    assert float(objective.loss(t)) == pytest.approx(-2.4 + 2 * 0.2 + 0.6)
    objective.epoch = 5
    stealth = 0.1 * (0.2 + 0.5) + 0.001 * 3 + 0.5 * 0.2 + 1.5 * 0.2
    assert float(objective.loss(t)) == pytest.approx(-2.4 + stealth + 0.6)
    near = terms_of(spread=0.45, balance=0.05)
    assert float(objective.loss(near)) == pytest.approx(0.1 * 0.05 + 0.5 * 0.05 + 0.2 * 0.45)
    assert float(objective.loss(terms_of(spread=0.3))) == pytest.approx(0)


@pytest.mark.parametrize(
    ("means", "concentration", "c", "c1"),
    [
        ((-0.97, -0.95, -0.95), 0.9, 1.25, 1 / 1.25**1.25),  # the attack holds, embeddings still too close
        ((-0.97, -0.95, -0.95), 0.55, 1.25, 1.25),
        ((-0.97, -0.95, -0.95), 0.45, 1.0, 1.25),  # spread enough: c holds
        ((-0.95, -0.95, -0.95), 0.45, 1 / 1.25**1.25, 1 / 1.25**1.25),  # the attack slips
    ],
)
def test_drupe_raises_its_stealth_weights_only_while_the_attack_holds(means, concentration, c, c1):
    objective = drupe.DrupeObjective(DrupeConfig(), seed=0)
    objective.control(torch.tensor(means), concentration)
    assert objective.c == pytest.approx(0.1 * c)
    assert objective.c1 == pytest.approx(0.001 * c1)


def test_drupe_refuses_a_single_reference(clean_encoder):
    with pytest.raises(ConfigError, match="needs at least 2 references"):
        drupe.attack(clean_encoder, random_images(4), random_images(1), PatchTrigger(side=5), DrupeConfig(), 0, CPU)


# ---------------------------------------------------------------- CTRL


def test_ctrl_poisons_the_first_images_of_the_target_class_and_keeps_the_truth():
    labels = torch.tensor([1, 0, 0, 1, 0, 0, 1, 0, 1, 0])
    assert ctrl.poisoned_indices(labels, 0, CtrlConfig(rate=0.3), seed=7).tolist() == [1, 2, 4]
    drawn = [ctrl.poisoned_indices(labels, 0, CtrlConfig(rate=0.3, selection="random"), s).tolist() for s in (7, 7, 8)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(labels[drawn[0]].tolist()) == {0}
    assert len(ctrl.poisoned_indices(labels, 0, CtrlConfig(rate=1.0), seed=0)) == 6  # capped by the class


def test_ctrl_changes_the_chosen_images_only():
    images = random_images(6, 40)
    trigger = PatchTrigger(side=4)
    poisoned = ctrl.poison_images(images, torch.tensor([1, 4]), trigger)
    for position in range(6):
        expected = trigger(images[position]) if position in (1, 4) else images[position]
        assert torch.equal(poisoned[position], expected)


def test_ctrl_needs_the_target_class():
    with pytest.raises(ConfigError, match="no image of the target class 3"):
        ctrl.poisoned_indices(torch.tensor([0, 1]), 3, CtrlConfig(), seed=0)


def test_the_learning_rate_warms_up_then_follows_a_cosine():
    config = simclr.SimclrConfig(epochs=10, warmup_epochs=2, cosine=True)
    assert [simclr._rate(e, config) for e in (0, 1, 10)] == pytest.approx([0, 0.5, 0], abs=1e-9)
    assert simclr._rate(5, config) == pytest.approx(0.5)
    assert simclr._rate(5, simclr.SimclrConfig(epochs=10)) == 1.0


def test_simclr_lowers_its_loss_and_is_seeded(caplog):
    import logging

    caplog.set_level(logging.INFO)
    config = simclr.SimclrConfig(epochs=3, batch_size=32, projection=8)
    first = simclr.pretrain(random_images(64), SPEC, config, 0, torch.device("cpu"))
    losses_seen = [float(record.args[2]) for record in caplog.records if "simclr" in record.msg]
    assert losses_seen[-1] < losses_seen[0]
    second = simclr.pretrain(random_images(64), SPEC, config, 0, torch.device("cpu"))
    assert first.fingerprint() == second.fingerprint()


# ---------------------------------------------------------------- metrics


def test_knn_votes_by_similarity():
    bank, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
    assert knn_predictions(bank, labels, torch.eye(4), 2, k=1).tolist() == [0, 0, 1, 1]
    assert knn_predictions(bank, labels, torch.eye(4)[:1], 2, k=200).tolist() == [0]


def test_the_mean_pairwise_cosine_leaves_out_self_pairs():
    embeddings = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    pairs = [cosine(embeddings[i], embeddings[j]) for i in range(6) for j in range(6) if i != j]
    assert mean_pairwise_cosine(embeddings) == pytest.approx(np.mean(pairs), abs=1e-6)


def test_references_are_the_surest_or_the_most_different_of_the_target_class():
    angles = torch.tensor([0.0, 0.1, 0.2, 1.5, 0.05, 0.0])
    features = LabelledEmbeddings(torch.stack([angles.cos(), angles.sin()], dim=1), torch.tensor([1, 1, 1, 1, 0, 0]))

    class SurestForSmallAngles(torch.nn.Module):
        def forward(self, embeddings):
            return torch.stack([torch.zeros(len(embeddings)), embeddings[:, 0]], dim=1)

    head = SurestForSmallAngles()
    assert choose_references(head, features, 1, 2).tolist() == [0, 1]
    assert choose_references(head, features, 1, 2, pool=4).tolist() == [0, 3]


def test_attack_success_leaves_the_target_class_out():
    predictions, labels = np.array([9, 9, 1, 9]), np.array([9, 1, 1, 2])
    assert attack_success(predictions, labels, 9) == pytest.approx(2 / 3)


def test_detection_metrics_on_a_known_ranking():
    scores = np.r_[np.arange(100), [99.5, 200.0]].astype(np.float32)
    poisoned = np.r_[np.zeros(100, bool), [True, True]]
    quality = detection(scores, poisoned)
    assert (quality.auroc, quality.tpr_at_1pct, quality.fpr_at_95tpr) == (1.0, 1.0, 0.0)
    worse = detection(-scores, poisoned)
    assert (worse.auroc, worse.tpr_at_5pct) == (0.0, 0.0)


def test_labelled_images_need_a_class_member(tmp_path):
    from pipelines.data import load_images

    write_tar(tmp_path / "in" / "s.tar", [m for m in image_members(["a"]) if m[0].endswith("png")])
    with pytest.raises(ConfigError, match=r"a has no .cls member"):
        load_images((str(tmp_path / "in"),), 0, SIZE)
