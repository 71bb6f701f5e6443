"""Fine-tuning, wrong use: what is missing or does not fit is named, and how to go on."""

import json

import pytest
from builders import encoded, labelled, random_image, tinted_image, write_encoder, write_tar

from sanitize.artifacts.head_folder import load_head
from sanitize.commands.finetune import finetune
from sanitize.config import EncoderSpec
from sanitize.config_loading import load_encoder_spec
from sanitize.errors import CheckpointError, ConfigError, RefusedError, SanitizeError
from sanitize.stages.encoders import load_encoder


def test_an_empty_clean_set_says_so(finetune_config, tmp_path):
    write_tar(tmp_path / "in" / "empty.tar", [])
    with pytest.raises(ConfigError, match=r"shards: no usable sample in 1 shard.*Did cleaning remove everything"):
        finetune(finetune_config(shards=(str(tmp_path / "in"),)))
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match=r"none: no \.tar, \.tar\.gz, \.tgz, \.tar\.zst found"):
        finetune(finetune_config(shards=(str(tmp_path / "none"),)))


def test_shards_without_labels_say_which_member_was_looked_for(finetune_config, tmp_path):
    write_tar(tmp_path / "in" / "s.tar", [("a.png", encoded(random_image(0))), ("a.txt", b"words")])
    with pytest.raises(ConfigError, match=r"sample 'a' has no label: no \.cls member \(it has png txt\)"):
        finetune(finetune_config(shards=(str(tmp_path / "in"),)))


def test_after_a_wrong_label_member_the_right_one_needs_no_other_folder(finetune_config, tmp_path):
    members = [(f"s{n}.png", encoded(tinted_image(n % 2, n))) for n in range(12)]
    members += [(f"s{n}.json", json.dumps({"label": n % 2}).encode()) for n in range(12)]
    shard = write_tar(tmp_path / "in" / "s.tar", sorted(members))
    with pytest.raises(ConfigError, match=r"has no label: no \.cls member"):
        finetune(finetune_config(shards=(str(shard),)))
    assert finetune(finetune_config(shards=(str(shard),), label_member="json:label")).samples == 12


def test_images_that_cannot_be_decoded_say_so(finetune_config, tmp_path):
    shards = labelled(tmp_path / "in", [6], broken=6)
    with pytest.raises(SanitizeError, match="none of the 6 samples can be decoded"):
        finetune(finetune_config(shards=(str(shards),), mode="full"))
    with pytest.raises(ConfigError, match="shards: none of its 6 images can be decoded"):
        finetune(finetune_config("other", shards=(str(shards),)))


def test_shards_without_captions_say_so(finetune_config, labelled_shards, tiny_clip_spec):
    with pytest.raises(
        ConfigError, match=r"96 no_caption\). No caption was found as txt: name its member with --caption"
    ):
        finetune(finetune_config(mode="contrastive", encoder=tiny_clip_spec))


def test_one_odd_label_does_not_make_a_hundred_million_classes(finetune_config, tmp_path):
    members = [("a.png", encoded(random_image(0))), ("a.cls", b"99999999")]
    shard = write_tar(tmp_path / "in" / "s.tar", members)
    with pytest.raises(
        ConfigError, match=r"classes: a sample has the label 99999999, .* 100000 are the limit\. Number the classes"
    ):
        finetune(finetune_config(shards=(str(shard),)))


def test_a_class_count_that_does_not_fit_says_so(finetune_config, validation, tmp_path):
    with pytest.raises(
        ConfigError, match=r"classes: a sample has the label 2, but there are 2 classes \(labels 0 to 1\)"
    ):
        finetune(finetune_config(classes=("a", "b")))
    write_tar(tmp_path / "v" / "s.tar", [("a.png", encoded(random_image(0))), ("a.cls", b"7")])
    with pytest.raises(ConfigError, match=r"validation: a sample has the label 7, but there are 3 classes"):
        finetune(finetune_config("other", validation=(str(tmp_path / "v"),)))
    with pytest.raises(ConfigError, match="target: 3, but there are 3 classes"):
        finetune(finetune_config("third", triggered=(str(validation),), target=3))


def test_the_folder_of_another_run_is_refused(finetune_config, tmp_path):
    finetune(finetune_config())
    with pytest.raises(RefusedError, match="head: holds a training that differs in seed. Give another --out"):
        finetune(finetune_config(seed=5))
    (tmp_path / "head" / "run.json").unlink()
    (tmp_path / "head" / "training").mkdir()
    (tmp_path / "head" / "training" / "last.pt").write_bytes(b"x")
    with pytest.raises(RefusedError, match=r"holds checkpoints of an unknown training \(no run.json\)"):
        finetune(finetune_config())


def test_another_encoder_in_the_same_folder_is_refused(finetune_config, tmp_path):
    finetune(finetune_config())
    other = load_encoder_spec(str(write_encoder(tmp_path / "other", seed=1)))
    with pytest.raises(RefusedError, match="holds a training that differs in encoder"):
        finetune(finetune_config(encoder=other))
    with pytest.raises(CheckpointError, match="its head was trained on another encoder"):
        load_head(str(tmp_path / "head"), load_encoder(other))


def test_divergence_is_an_error_not_a_head(finetune_config, tmp_path):
    with pytest.raises(SanitizeError, match=r"training diverged in epoch \d .*Lower --learning-rate"):
        finetune(finetune_config(mode="full", learning_rate=1e30))
    assert not (tmp_path / "head" / "head.json").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "both"}, "mode: 'both' is not one of linear, mlp, full, contrastive"),
        ({"patience": 2}, "patience: needs shards to measure on. Give --validation"),
        ({"triggered": ("x",)}, "triggered: name the class that the trigger aims at, for example --target 0"),
        ({"mode": "contrastive"}, "mode contrastive: the encoder has no text tower. It needs architecture clip"),
        (
            {"mode": "full", "encoder": EncoderSpec("exported:x.pt2")},
            "mode full: an exported encoder cannot be trained",
        ),
        ({"batch_size": 2, "accumulate": 3}, "batch_size: 2 cannot be computed in 3 parts. Lower accumulate"),
        ({"warmup_epochs": 3.0}, "warmup_epochs: 3 is not below epochs, 3"),
        ({"prompts": ("a photo",)}, "prompts: each needs {} where the class name goes"),
        ({"lanes": 0}, "lanes must be at least 1"),
        ({"epochs": 0}, "epochs and accumulate must be at least 1"),
    ],
)
def test_wrong_settings_say_what_to_change(finetune_config, changes, words):
    with pytest.raises(ConfigError, match=words):
        finetune_config(**changes)
