"""Heads: shapes, files, and refusal of a head that belongs to another encoder."""

import json

import numpy as np
import pytest
import torch
from builders import write_encoder

from sanitize.artifacts.head_folder import TrainedHead, load_head, save_head
from sanitize.config_loading import load_encoder_spec
from sanitize.errors import CheckpointError
from sanitize.stages.encoders import load_encoder
from sanitize.training.augment import random_views
from sanitize.training.heads import Head, fresh_head


@pytest.fixture
def encoder(encoder_spec):
    return load_encoder(encoder_spec)


@pytest.fixture
def saved(encoder, tmp_path):
    torch.manual_seed(0)
    trained = TrainedHead(Head("mlp", 32, 3), ("cat", "dog", "tree"), encoder.fingerprint())
    save_head(trained, str(tmp_path / "head"), {"epochs": 3})
    return trained, str(tmp_path / "head")


def test_the_mlp_is_the_papers_and_the_linear_head_one_layer():
    shapes = {
        kind: [tuple(p.shape) for p in Head(kind, 32, 10).layers.parameters() if p.ndim == 2]
        for kind in ("mlp", "linear")
    }
    assert shapes == {"mlp": [(512, 32), (256, 512), (10, 256)], "linear": [(10, 32)]}


def test_a_fresh_head_comes_from_its_seed_and_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = fresh_head("mlp", 8, 3, seed=1), fresh_head("mlp", 8, 3, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(next(first.parameters()), next(second.parameters()))


def test_logits_do_not_depend_on_the_length_of_embeddings():
    head, embeddings = Head("linear", 8, 3), torch.randn(5, 8)
    torch.testing.assert_close(head(embeddings), head(embeddings * 100))
    assert torch.isfinite(head(torch.zeros(1, 8))).all()


def test_dropout_keeps_the_expected_value_and_comes_from_its_generator():
    head = Head("mlp", 32, 3)
    kept = head.dropout(400, np.random.default_rng(1))
    assert kept.float().mean() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(kept, head.dropout(400, np.random.default_rng(1)))
    assert Head("linear", 32, 3).dropout(4, np.random.default_rng(1)) is None


def test_a_saved_head_comes_back_with_its_class_names(saved, encoder):
    trained, folder = saved
    loaded = load_head(folder, encoder)
    embeddings = torch.randn(6, 32)
    assert loaded.classes == ("cat", "dog", "tree")
    assert np.array_equal(loaded.predictions(embeddings), trained.predictions(embeddings))


def test_the_head_of_another_encoder_is_refused(saved, tmp_path):
    other = load_encoder(load_encoder_spec(str(write_encoder(tmp_path / "other", seed=1))))
    with pytest.raises(
        CheckpointError, match=r"its head was trained on another encoder: .* Give the encoder it was trained on"
    ):
        load_head(saved[1], other)


def test_a_missing_damaged_or_other_versions_head_says_so(saved, encoder, tmp_path):
    with pytest.raises(CheckpointError, match=r"no head there \(head.json is missing\). Run `sanitize finetune` first"):
        load_head(str(tmp_path), encoder)
    (tmp_path / "head" / "head.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"head.safetensors: does not match head.json \(changed or damaged\)"):
        load_head(saved[1], encoder)
    values = json.loads((tmp_path / "head" / "head.json").read_text()) | {"format_version": 9}
    (tmp_path / "head" / "head.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"written by another version of sanitize \(format 9, this one reads 1\)"):
        load_head(saved[1], encoder)


def test_a_random_view_depends_on_the_sample_and_the_epoch_not_on_the_batch():
    images, numbers = torch.rand(6, 3, 16, 16), np.arange(6)
    views = random_views(images, numbers, 3, 0)
    torch.testing.assert_close(random_views(images[2:4], numbers[2:4], 3, 0), views[2:4])
    assert not torch.allclose(random_views(images, numbers, 3, 1), views)
    assert views.min() >= 0
    assert views.max() <= 1
