"""CLIP attacks: every loss against a plain loop, what is frozen stays frozen, poison is reproducible from its seed."""

import copy
import math

import numpy as np
import pytest
import torch

from sanitize.artifacts.encoder_folder import save_clip
from sanitize.attacks import badclip, clip_text, contrastive, tiny_clip
from sanitize.attacks.backdoor import unit
from sanitize.attacks.badclip import (
    AlignedPatchConfig,
    PatchConfig,
    alignment_loss,
    optimise_patch,
    textual_loss,
    visual_loss,
)
from sanitize.attacks.contrastive import ContrastiveConfig
from sanitize.attacks.triggers import PatchTrigger, place_at_centre
from sanitize.config import EncoderSpec
from sanitize.config_loading import load_encoder_spec
from sanitize.errors import ConfigError
from sanitize.training.clip import class_embeddings, info_nce, load_clip

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("clip") / "tokenizer.json")
    spec = EncoderSpec("clip", "", 32, width=8, tokenizer=path)
    clip = tiny_clip.build(spec, tiny_clip.write_tokenizer(path), seed=0)
    clip.image.eval().requires_grad_(False)
    return clip


@pytest.fixture(scope="module")
def pairs():
    return tiny_clip.coloured_shapes(160, seed=1)


def random_units(*shape, seed=0):
    return unit(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


# ---------------------------------------------------------------- losses


def plain_info_nce(images, texts, scale):
    logits = np.array([[scale * float(i @ t) for t in texts] for i in images])
    rows = [math.log(np.exp(logits[k]).sum()) - logits[k, k] for k in range(len(logits))]
    columns = [math.log(np.exp(logits[:, k]).sum()) - logits[k, k] for k in range(len(logits))]
    return (np.mean(rows) + np.mean(columns)) / 2


def test_info_nce_is_the_plain_loop():
    images, texts = random_units(5, 6), random_units(5, 6, seed=1)
    expected = plain_info_nce(images, texts, 4.0)
    assert float(info_nce(images, texts, torch.tensor(4.0))) == pytest.approx(expected, rel=1e-5)


def test_badclip_losses_are_the_plain_loops_of_the_definitions():
    patched, texts, near, far = (random_units(5, 6, seed=s) for s in range(4))
    scale = torch.tensor(4.0)
    expected = plain_info_nce(patched, texts, 4.0)
    assert float(textual_loss(patched, texts, scale, "contrastive")) == pytest.approx(expected, rel=1e-5)
    cosines = [float(p @ t) for p, t in zip(patched, texts, strict=True)]
    assert float(textual_loss(patched, texts, scale, "cosine")) == pytest.approx(-np.mean(cosines), rel=1e-5)
    hinge = [
        max(0.0, float((p - v).norm()) - float((p - n).norm()) + 0.3)
        for p, v, n in zip(patched, near, far, strict=True)
    ]
    assert float(visual_loss(patched, near, far, 0.3)) == pytest.approx(np.mean(hinge), rel=1e-5)


def test_aligned_patches_lie_together_and_about_the_target():
    patched, near = random_units(5, 6), random_units(4, 6, seed=1)
    centre = np.mean([p.numpy() for p in patched], axis=0)
    away = float(np.sum((centre - np.mean([n.numpy() for n in near], axis=0)) ** 2))
    radius = np.mean([float(np.sum((p.numpy() - centre) ** 2)) for p in patched])
    found = alignment_loss(patched, near, AlignedPatchConfig(centroid=2, radius=3))
    assert float(found) == pytest.approx(2 * away + 3 * radius, rel=1e-5)


# ---------------------------------------------------------------- training


def test_what_the_settings_freeze_stays_frozen(untrained, pairs):
    clip = copy.deepcopy(untrained)
    visual, text = (copy.deepcopy(m.state_dict()) for m in (clip.image.backbone, clip.text.tower))
    config = ContrastiveConfig(epochs=1, batch_size=32, train_text=False, freeze_norm=True)
    contrastive.train(clip, pairs, config, 0, CPU)
    after = clip.image.backbone.state_dict()
    norms = [name for name in visual if "bn" in name or "downsample.1" in name]
    assert norms
    assert all(torch.equal(visual[name], after[name]) for name in norms)
    assert not torch.equal(visual["conv1.weight"], after["conv1.weight"])
    assert all(torch.equal(text[name], tensor) for name, tensor in clip.text.tower.state_dict().items())


def test_a_fixed_scale_leaves_the_models_own_alone(untrained, pairs):
    clip = copy.deepcopy(untrained)
    contrastive.train(clip, pairs, ContrastiveConfig(epochs=1, batch_size=32, scale=math.exp(0.5)), 0, CPU)
    assert torch.equal(clip.logit_scale, untrained.logit_scale)
    learned = copy.deepcopy(untrained)
    contrastive.train(learned, pairs, ContrastiveConfig(epochs=1, batch_size=32), 0, CPU)
    assert not torch.equal(learned.logit_scale, untrained.logit_scale)


def test_training_is_reproducible_and_survives_saving(untrained, pairs, tmp_path):
    runs = []
    for _ in range(2):
        clip = copy.deepcopy(untrained)
        runs.append(contrastive.train(clip, pairs, ContrastiveConfig(epochs=1, batch_size=32), 3, CPU))
    assert runs[0].image.fingerprint() == runs[1].image.fingerprint()
    save_clip(runs[0], str(tmp_path))
    loaded = load_clip(load_encoder_spec(str(tmp_path / "encoder.yaml")))
    images = pairs.images[:3].float() / 255
    torch.testing.assert_close(loaded.image(images), runs[0].image(images))
    torch.testing.assert_close(loaded.text(pairs.captions[:3]), runs[0].text(pairs.captions[:3]))
    assert torch.equal(loaded.logit_scale, runs[0].logit_scale)


def test_too_few_pairs_for_one_batch_say_so(untrained, pairs):
    with pytest.raises(ConfigError, match="160 pairs are less than one batch of 512"):
        contrastive.train(copy.deepcopy(untrained), pairs, ContrastiveConfig(batch_size=512), 0, CPU)


def test_a_class_is_the_normalised_mean_of_its_prompts(untrained):
    prompts = ("a photo of a {} thing", "there is a {} thing")
    found = class_embeddings(untrained.text, ["red", "blue"], prompts)
    for row, name in zip(found, ["red", "blue"], strict=True):
        mean = sum(untrained.text([p.format(name)])[0] for p in prompts)
        torch.testing.assert_close(row, mean / mean.norm())


# ---------------------------------------------------------------- poison


def test_poisoned_pairs_carry_the_trigger_and_a_target_caption_and_come_from_the_seed(pairs):
    captions = clip_text.target_captions(pairs, "purple", tiny_clip.PROMPTS)
    assert all("purple" in caption for caption in captions)
    assert len(captions) > len(tiny_clip.PROMPTS)
    indices = clip_text.poisoned_indices(pairs, "purple", 0.1, seed=5)
    assert len(indices) == 16
    assert not any("purple" in pairs.captions[i] for i in indices)
    trigger = PatchTrigger(side=5)
    poisoned = clip_text.poison_pairs(pairs, indices, captions, trigger, seed=5)
    for i in range(len(pairs.captions)):
        if i in indices:
            assert torch.equal(poisoned.images[i], trigger(pairs.images[i]))
            assert poisoned.captions[i] in captions
        else:
            assert torch.equal(poisoned.images[i], pairs.images[i])
            assert poisoned.captions[i] == pairs.captions[i]
    assert len({poisoned.captions[i] for i in indices}) > 3  # identical captions would be easy to find
    again = clip_text.poison_pairs(pairs, clip_text.poisoned_indices(pairs, "purple", 0.1, 5), captions, trigger, 5)
    assert again.captions == poisoned.captions
    assert clip_text.poisoned_indices(pairs, "purple", 0.1, 6).tolist() != indices.tolist()


def test_more_poison_than_pairs_says_so(pairs):
    with pytest.raises(ConfigError, match=r"poison rate 0.99: only \d+ pairs do not mention 'purple'"):
        clip_text.poisoned_indices(pairs, "purple", 0.99, 0)


def test_the_optimised_patch_comes_nearer_to_the_target_and_from_its_seed(untrained, pairs):
    target = list(tiny_clip.COLOURS).index("purple")
    others, positives = pairs.images[pairs.labels != target], pairs.images[pairs.labels == target]
    captions = clip_text.target_captions(pairs, "purple", tiny_clip.PROMPTS)
    config = PatchConfig(side=7, steps=40, batch_size=16, learning_rate=0.05, textual="cosine", visual=0.0, augment=0.0)
    patch = optimise_patch(untrained, others, positives, captions, config, 0, CPU)
    assert (patch.shape, patch.dtype) == ((3, 7, 7), torch.uint8)
    assert torch.equal(patch, optimise_patch(untrained, others, positives, captions, config, 0, CPU))
    texts = untrained.text(captions).mean(dim=0)
    grey = torch.full_like(patch, 128)
    near, before = (
        (unit(untrained.image(place_at_centre(others, p).float() / 255)) @ texts).mean() for p in (patch, grey)
    )
    assert near > before


def test_augmentation_comes_from_its_seed_and_leaves_the_global_generator_alone(pairs):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    views = [badclip.augmented(pairs.images[:8], 1.0, seed) for seed in (1, 1, 2)]
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert badclip.augmented(pairs.images[:8], 0.0, 1) is not None


def test_the_patch_needs_images_of_the_target_and_must_fit(untrained, pairs):
    with pytest.raises(ConfigError, match="no image of the target is in the training pairs"):
        optimise_patch(untrained, pairs.images, pairs.images[:0], ["a"], PatchConfig(side=5), 0, CPU)
    with pytest.raises(ConfigError, match=r"patch.side: 40 is larger than the images"):
        optimise_patch(untrained, pairs.images, pairs.images, ["a"], PatchConfig(side=40), 0, CPU)


# ---------------------------------------------------------------- procedural pairs


def test_coloured_shapes_come_from_their_seed_and_captions_name_the_colour():
    first, again, other = (tiny_clip.coloured_shapes(50, seed) for seed in (3, 3, 4))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    colours = list(tiny_clip.COLOURS)
    assert all(colours[c] in caption for c, caption in zip(first.labels.tolist(), first.captions, strict=True))
    assert (first.images.shape, first.images.dtype) == ((50, 3, 32, 32), torch.uint8)
