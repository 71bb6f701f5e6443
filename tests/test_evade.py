"""The attacker who keeps norms and spread natural: where triggered images ought to go, what he pays for, what does not learn."""

import numpy as np
import pytest
import torch
from builders import SPEC, random_images, random_step

from sanitize.attacks import badencoder, evade
from sanitize.attacks.backdoor import fine_tune, unit
from sanitize.attacks.badencoder import BadEncoderConfig, BadEncoderObjective
from sanitize.attacks.evade import EvadeConfig, EvadeObjective
from sanitize.attacks.triggers import PatchTrigger
from sanitize.errors import ConfigError
from sanitize.stages.encoders import Encoder, build_backbone


def test_the_evading_target_has_the_cosine_and_the_norm_of_the_image_without_trigger():
    step = random_step(references=1)
    targets = evade.natural_targets(step, 0.8)
    reference = step.reference_target[0]
    for own, norm, target in zip(step.clean_target, step.clean_norm, targets, strict=True):
        assert float(target.norm()) == pytest.approx(float(norm), rel=1e-5)
        assert float(unit(target) @ reference) == pytest.approx(0.8, abs=1e-5)
        plane = torch.stack([reference, own], dim=1)
        residual = target - plane @ torch.linalg.lstsq(plane, target[:, None]).solution[:, 0]
        assert float(residual.norm()) < 1e-4


def test_the_evading_attacker_pays_for_what_triggered_and_clean_images_miss():
    step = random_step(references=1)
    config = EvadeConfig(lambda1=2.0, lambda2=3.0)
    targets = evade.natural_targets(step, config.cosine)
    wanted = {"triggered": targets, "clean": step.clean_target * step.clean_norm[:, None]}
    expected = 2 * float(badencoder.keep_references(step))
    for name, weight in (("triggered", 1), ("clean", 3)):
        pairs = zip(getattr(step, name), wanted[name], strict=True)
        expected += weight * float(np.mean([float((a - b).norm() / b.norm()) ** 2 for a, b in pairs]))
    assert float(EvadeObjective(config)(step)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ConfigError, match=r"evade.cosine: 1.0 is not between 0 and 1"):
        EvadeConfig(cosine=1.0)


def test_frozen_parameters_stay_and_the_others_learn():
    torch.manual_seed(0)
    clean = Encoder(build_backbone(SPEC), SPEC).eval()
    images = random_images(8)
    config = BadEncoderConfig(epochs=1, batch_size=4, learning_rate=1e-2)
    objective = BadEncoderObjective(config)
    device = torch.device("cpu")
    tuned = fine_tune(
        clean, images, images[:1], PatchTrigger(side=4), objective, config, 0, device, ("conv1", "layer1")
    )
    moved = {
        name.split(".")[0]
        for (name, before), after in zip(clean.backbone.named_parameters(), tuned.backbone.parameters(), strict=True)
        if not torch.equal(before, after)
    }
    assert moved == {"layer2", "layer3", "layer4"}
