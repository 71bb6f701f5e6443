from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from sanitize.config_models import DecoderConfig
from sanitize.stages.decoder import Decoder, hidden_pixels, patch_order, visible_count
from sanitize.stages.scoring import mean_score, paper_score

PAPER_SHAPE = DecoderConfig(32, 4, 192, 3, 12, 4)


@pytest.mark.parametrize(
    ("patches", "ratio", "expected"),
    [
        (64, 0.75, 16),
        (64, 0.9, 6),
        (64, 0.99, 0),
        (49, 0.9, 4),
        (196, 0.99, 1),
        (256, 0.99, 2),
        (3136, 0.99, 31),
        (64, 1.0, 0),
    ],
)
def test_visible_patches_are_counted_like_the_reference(patches, ratio, expected):
    assert visible_count(patches, ratio) == expected


@pytest.mark.parametrize(
    ("config", "embedding", "parameters"),
    [(PAPER_SHAPE, 512, 7_251_120), (DecoderConfig(224, 32, 192, 3, 12, 4), 1024, 8_507_904)],
)
def test_the_paper_preset_has_the_reference_number_of_parameters(config, embedding, parameters):
    assert sum(p.numel() for p in Decoder(config, embedding).parameters()) == parameters


# ---------------------------------------------------------------- parity with the reference model

RENAMES = {
    "encoder.patchify": "patch_embed",
    "encoder.layer_norm": "encoder_norm",
    "encoder.transformer": "encoder_blocks",
    "encoder.cls_token": "cls_token",
    "encoder.pos_embedding": "encoder_positions",
    "decoder.transformer": "decoder_blocks",
    "decoder.mask_token": "mask_token",
    "decoder.pos_embedding": "decoder_positions",
    "decoder.head": "pixel_head",
    "mlp.0": "project_embedding",
    "attn.": "",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}


@pytest.fixture(scope="module")
def reference():
    return safetensors.torch.load_file(Path(__file__).with_name("dede_parity.safetensors"))


@pytest.fixture(scope="module")
def reference_decoder(reference):
    decoder = Decoder(DecoderConfig(32, 4, 24, 3, 2, 2), 512)
    weights = {}
    for name, tensor in reference.items():
        if name.startswith("weights."):
            ours = name.removeprefix("weights.")
            for theirs, mine in RENAMES.items():
                ours = ours.replace(theirs, mine)
            weights[ours] = (
                tensor.squeeze(1) if "positions" in ours else tensor.flatten() if "token" in ours else tensor
            )
    decoder.load_state_dict(weights | {k: v for k, v in decoder.state_dict().items() if k.startswith("embedding_")})
    return decoder.eval()


@pytest.mark.parametrize("ratio", ["0.99", "0.75"])
@torch.inference_mode()
def test_reference_predictions_masks_and_scores_are_reproduced(reference, reference_decoder, ratio):
    images, order = reference["x"], reference[f"r{ratio}.permutation"]
    visible = visible_count(64, float(ratio))
    predictions = reference_decoder(reference["z"], images, order, visible)
    hidden = hidden_pixels(order, visible, reference_decoder.config)
    torch.testing.assert_close(predictions, reference[f"r{ratio}.prediction"], rtol=1e-4, atol=1e-5)
    assert torch.equal(hidden.expand(-1, 3, -1, -1).float(), reference[f"r{ratio}.mask"])
    torch.testing.assert_close(
        paper_score(images, predictions, hidden), reference[f"r{ratio}.score"], rtol=1e-4, atol=0
    )


@torch.inference_mode()
def test_with_nothing_visible_the_patch_encoder_does_not_run(reference, reference_decoder):
    with_images = reference_decoder(reference["z"], reference["x"], reference["r0.99.permutation"], 0)
    calls = []
    handle = reference_decoder.encoder_norm.register_forward_hook(lambda *_: calls.append(1))
    without = reference_decoder(reference["z"])
    handle.remove()
    assert torch.equal(with_images, without)
    assert calls == []


# ---------------------------------------------------------------- formulas against plain loops


def test_paper_score_is_the_plain_loop_of_the_reference_code():
    generator = torch.Generator().manual_seed(0)
    images, guesses = torch.randn(2, 2, 3, 8, 8, generator=generator)
    order = torch.rand(2, 4, generator=generator).argsort(dim=1)
    config = DecoderConfig(8, 4, 16, 2, 1, 1)
    hidden = hidden_pixels(order, 1, config)
    for number in range(2):
        total, count = 0.0, 0
        shown = int(order[number, 0])
        for row in range(8):
            for column in range(8):
                if (row // 4) * 2 + column // 4 == shown:
                    continue
                for channel in range(3):
                    total += float(images[number, channel, row, column] - guesses[number, channel, row, column]) ** 2
                    count += 1
        assert float(paper_score(images, guesses, hidden)[number]) == pytest.approx(total, rel=1e-5)
        assert float(mean_score(images, guesses, hidden)[number]) == pytest.approx(total / count, rel=1e-5)


def test_the_mask_depends_on_the_image_and_the_seed_alone():
    first = patch_order("ab" * 32, 64, seed=1)
    assert sorted(first) == list(range(64))
    assert np.array_equal(first, patch_order("ab" * 32, 64, seed=1))
    assert not np.array_equal(first, patch_order("ab" * 32, 64, seed=2))
    assert not np.array_equal(first, patch_order("ac" * 32, 64, seed=1))


def test_gradients_reach_every_part_when_patches_are_visible():
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(8, 2, 16, 2, 1, 1), 4)
    order = torch.rand(2, 16).argsort(dim=1)
    decoder(torch.randn(2, 4), torch.randn(2, 3, 8, 8), order, 4).square().mean().backward()
    assert [name for name, p in decoder.named_parameters() if p.grad is None] == []
