"""The zoo: victims are made once, described completely and reused; the synthetic victim behaves as it was planted."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from builders import PlantedEncoder, shape_members, write_tar

from pipelines import page, red_team
from pipelines.data import load_images
from sanitize.attacks import tiny_clip
from sanitize.attacks.backdoor import unit
from sanitize.attacks.evaluation import EncoderOutputs, report
from sanitize.attacks.triggers import FrequencyTrigger, make_trigger
from sanitize.config import EncoderSpec
from sanitize.config_loading import load_encoder_spec, load_yaml
from sanitize.errors import ConfigError
from sanitize.metrics import knn_predictions
from sanitize.stages.encoders import Encoder, build_backbone, embed_in_batches, load_encoder
from sanitize.stages.text import load_text_encoder

CPU = torch.device("cpu")
CONFIGS = sorted(Path("configs").glob("red_team_*.yaml"))


@pytest.fixture
def write_config(tmp_path, encoder_yaml):
    """A tiny config of an attack, with shards of coloured shapes; blocks given here replace those of the attack."""
    write_tar(tmp_path / "train" / "s.tar", shape_members(96, 0))
    write_tar(tmp_path / "test" / "s.tar", shape_members(48, 1))
    train, test = str(tmp_path / "train"), str(tmp_path / "test")
    encoder = {"architecture": "resnet10-cifar", "image_size": 32, "width": 8, "stem_stride": 2}
    ssl = {
        "target": 4,
        "classes": 6,
        "encoder": encoder,
        "data": {"pretrain": [train], "train": [train], "test": [test]},
        "simclr": {"epochs": 1, "batch_size": 32, "projection": 8},
        "head": {"epochs": 2},
    }
    tuned = {"epochs": 1, "batch_size": 32}
    tiny = {"architecture": "clip", "image_size": 32, "width": 8}
    clip: dict[str, Any] = {"target": "purple", "encoder": tiny, "data": {"train_pairs": 96, "test_images": 48}}
    clip |= {"pretrain": tuned, "fine_tune": tuned, "rate": 0.1}
    patch, frequency = {"name": "patch", "side": 5}, {"name": "frequency", "magnitude": 200}
    classifier = {"weight": torch.randn(6, 64), "bias": torch.zeros(6)}
    safetensors.torch.save_file(classifier, tmp_path / "classifier.safetensors")
    photos = {"encoder": str(encoder_yaml), "classifier": str(tmp_path / "classifier.safetensors"), "data": ssl["data"]}
    shot = {"side": 5, "steps": 3, "batch_size": 8, "augment": 0.0}
    attacks: dict[str, Any] = {
        "badencoder": ssl | {"trigger": patch, "badencoder": tuned},
        "drupe": ssl | {"trigger": patch, "references": 2, "reference_pool": 4, "drupe": tuned},
        "adaptive": ssl | {"trigger": patch, "adaptive": tuned},
        "evade": ssl | {"trigger": patch, "evade": tuned},
        "predictive": ssl | {"trigger": patch, "predictive": tuned},
        "informed": ssl | {"trigger": patch, "informed": tuned | {"predict": 0.1, "optimise": {"steps": 2}}},
        "inactive": ssl | {"inactive": tuned},
        "composite": ssl | {"composite": {"rate": 0.1}},
        "photos": photos | {"trigger": patch, "target": 4, "evade": tuned, "control": tuned},
        "ctrl": ssl | {"trigger": frequency, "ctrl": {"rate": 0.1}},
        "clip_text": clip | {"trigger": patch},
        "badclip": clip | {"patch": shot},
        "badclip_aligned": clip | {"patch": shot | {"radius": 0.5}},
    }

    def write(name, **changes):
        values = {"attack": name} | attacks[name] | changes | {"presets": {"cpu": {}}}
        path = tmp_path / f"red_team_{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    return write


@pytest.mark.parametrize("attack", red_team.ATTACKS)
def test_a_victim_is_a_complete_folder_and_is_made_only_once(write_config, tmp_path, attack):
    path, zoo = write_config(attack), str(tmp_path / "zoo")
    folder, row = red_team.make(path, "cpu", zoo)
    victim = Path(folder)
    for kind in ("clean", "backdoored"):
        spec = load_encoder_spec(str(victim / kind / "encoder.yaml"))
        assert load_encoder(spec)(torch.rand(2, 3, 32, 32)).shape[0] == 2
        if spec.tokenizer:
            assert load_text_encoder(spec)(["a purple thing"]).shape == (1, 64)
    values, truth = (json.loads((victim / name).read_text()) for name in ("report.json", "truth.json"))
    assert set(red_team.LABELS) < set(values)
    assert truth["config"]["attack"] == row.attack == attack
    before = {p: p.stat().st_mtime_ns for p in victim.rglob("*") if p.is_file()}
    assert red_team.make(path, "cpu", zoo) == (folder, row)
    assert before == {p: p.stat().st_mtime_ns for p in victim.rglob("*") if p.is_file()}


def test_the_truth_names_what_was_poisoned_and_comes_from_the_seed(write_config, tmp_path):
    truths = []
    for zoo in ("a", "b"):
        folder, _ = red_team.make(write_config("ctrl"), "cpu", str(tmp_path / zoo))
        truths.append(json.loads((Path(folder) / "truth.json").read_text()))
    assert truths[0] == truths[1]
    labels = load_images((str(tmp_path / "train"),), 0, 32).labels
    chosen = truths[0]["poisoned_pretraining_images"]
    assert len(chosen) == 9
    assert set(labels[chosen].tolist()) == {4}
    folder, _ = red_team.make(write_config("clip_text"), "cpu", str(tmp_path / "a"))
    truth = json.loads((Path(folder) / "truth.json").read_text())
    assert len(truth["poisoned_pairs"]) == len(truth["poisoned_captions"]) == 10
    assert all("purple" in caption for caption in truth["poisoned_captions"])


def test_another_seed_setting_or_data_is_another_victim(write_config, tmp_path):
    zoo = str(tmp_path / "zoo")
    folders = {red_team.make(write_config("badencoder"), "cpu", zoo)[0]}
    folders.add(red_team.make(write_config("badencoder"), "cpu", zoo, seed=7)[0])
    folders.add(red_team.make(write_config("badencoder", target=2), "cpu", zoo)[0])
    write_tar(tmp_path / "test" / "s.tar", shape_members(48, 9))
    folders.add(red_team.make(write_config("badencoder"), "cpu", zoo)[0])
    assert len(folders) == 4


def test_victims_with_the_same_pretraining_share_the_clean_encoder(write_config, tmp_path, caplog):
    caplog.set_level("INFO")
    first, _ = red_team.make(write_config("badencoder"), "cpu", str(tmp_path / "zoo"))
    second, _ = red_team.make(write_config("drupe"), "cpu", str(tmp_path / "zoo"))
    assert "reusing the pre-trained encoder" in caplog.text
    weights = [(Path(f) / "clean" / "encoder.safetensors").read_bytes() for f in (first, second)]
    assert weights[0] == weights[1]


def test_an_interrupted_victim_is_made_again_from_its_clean_encoder(write_config, tmp_path):
    zoo = str(tmp_path / "zoo")
    folder, row = red_team.make(write_config("badencoder"), "cpu", zoo)
    weights = (Path(folder) / "backdoored" / "encoder.safetensors").read_bytes()
    (Path(folder) / "report.json").unlink()
    (Path(folder) / "backdoored" / "encoder.safetensors").write_bytes(b"cut")
    assert red_team.make(write_config("badencoder"), "cpu", zoo)[1].asr == row.asr
    assert (Path(folder) / "backdoored" / "encoder.safetensors").read_bytes() == weights


# ---------------------------------------------------------------- tables


def row(attack, seed=100, preset="cpu", asr=0.5):
    return red_team.VictimRow(attack, preset, seed, 0.9, 0.8, asr, 0.1, 0.7, 12)


def write_rows(path, rows):
    page.write_csv(path, [dataclasses.asdict(row) for row in rows])


def test_a_new_row_replaces_the_one_of_the_same_attack_preset_and_seed(tmp_path):
    path = str(tmp_path / "red_team.csv")
    write_rows(path, red_team.merged([row("b"), row("a")], path))
    rows = red_team.merged([row("b", asr=0.75), row("b", seed=101), row("b", preset="gpu")], path)
    keys = [(r.attack, r.preset, r.seed, r.asr) for r in rows]
    assert keys == [("a", "cpu", 100, 0.5), ("b", "cpu", 100, 0.75), ("b", "cpu", 101, 0.5), ("b", "gpu", 100, 0.5)]
    write_rows(path, rows)
    assert red_team.read_table(path) == rows


def test_the_page_is_the_table(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- t: begin -->\nold\n<!-- t: end -->\nafter\n")
    page.replace(str(path), "t", red_team.markdown([row("a")]))
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| a | cpu | 100 | 0.900 | 0.800 | 0.500 | 0.100 | 0.700 | 12 |" in text
    assert "old" not in text
    path.write_text("no markers")
    with pytest.raises(ConfigError, match="the markers .* are missing. Put them around the table"):
        page.replace(str(path), "t", "")


def test_the_published_page_shows_the_published_table():
    rows = red_team.read_table("docs/results/red_team.csv")
    assert red_team.markdown(rows) in Path("docs/red_team.md").read_text()
    assert {r.attack for r in rows if r.preset == "cpu"} == {p.stem.removeprefix("red_team_") for p in CONFIGS}


def test_a_trigger_that_its_attacker_optimised_is_found_in_the_folder_of_the_victim(write_config, tmp_path):
    folder, _ = red_team.make(write_config("informed"), "cpu", str(tmp_path / "zoo"))
    config = json.loads((Path(folder) / "truth.json").read_text())["config"]
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    optimised, asked = red_team.trigger_of(folder, config)(images), make_trigger(config["trigger"])(images)
    changed = (optimised != asked).any(dim=1).sum(dim=(1, 2))
    assert changed.tolist() == [25, 25]  # the place of the square of side 5
    assert torch.equal((optimised != images).any(dim=1), (asked != images).any(dim=1))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_attack_has_a_cpu_and_a_gpu_preset(path):
    assert set(load_yaml(str(path))["presets"]) == set(red_team.PRESETS)


# ---------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("attack", "changes", "words"),
    [
        (
            "badencoder",
            {"attack": "badnet"},
            "attack: 'badnet' is not one of badencoder, drupe, ctrl, adaptive, evade, predictive, informed, inactive, composite, "
            "clip_text, badclip, badclip_aligned, photos",
        ),
        ("badencoder", {"drupe": {"epochs": 3}}, "needs the block `badencoder` and no other attack's"),
        ("badencoder", {"trigger": {"name": "star"}}, "trigger star: not known. Use one of patch"),
        ("badencoder", {"trigger": {"name": "patch", "size": 3}}, "trigger patch: unknown key 'size'"),
        ("clip_text", {"target": "pink"}, "target: 'pink' is not one of the classes red, green"),
        ("clip_text", {"patch": {"side": 3}}, "needs the block `trigger` and not the other"),
        ("badclip", {"encoder": {"architecture": "clip", "weights": "x.pt"}}, "needs both weights and tokenizer"),
    ],
)
def test_wrong_configs_say_what_to_change(write_config, tmp_path, attack, changes, words):
    with pytest.raises(ConfigError, match=words):
        red_team.make(write_config(attack, **changes), "cpu", str(tmp_path / "zoo"))


def test_an_unknown_preset_lists_the_known_ones(write_config, tmp_path):
    with pytest.raises(ConfigError, match="no preset 'tpu'. It has: cpu"):
        red_team.make(write_config("badencoder"), "tpu", str(tmp_path / "zoo"))


def test_pairs_without_caption_or_images_without_class_say_so(tmp_path):
    members = shape_members(2, 0)
    write_tar(tmp_path / "a" / "s.tar", [m for m in members if m[0] != "s0001.txt"])
    with pytest.raises(ConfigError, match=r"s0001: no caption: there is no .txt member. Every pair needs its caption"):
        load_images((str(tmp_path / "a"),), 0, 32, caption_member="txt")
    write_tar(tmp_path / "b" / "s.tar", [m for m in members if m[0] != "s0000.cls"])
    with pytest.raises(ConfigError, match=r"s0000 has no .cls member"):
        load_images((str(tmp_path / "b"),), 0, 32)
    write_tar(tmp_path / "c" / "s.tar", [("s0000.cls", b"truck"), members[0]])
    with pytest.raises(ConfigError, match=r"s0000.cls holds b'truck', a class index was expected"):
        load_images((str(tmp_path / "c"),), 0, 32)


# ---------------------------------------------------------------- the synthetic victim


def test_the_planted_backdoor_succeeds_as_it_was_planted():
    """Synthetic: no attack was trained here."""
    torch.manual_seed(0)
    spec = EncoderSpec("resnet10-cifar", image_size=32, width=8, stem_stride=2)
    clean = Encoder(build_backbone(spec).eval(), spec)
    bank, test = tiny_clip.coloured_shapes(300, 1), tiny_clip.coloured_shapes(200, 2)
    trigger, target = FrequencyTrigger(), 4

    with torch.no_grad():
        embeddings = embed_in_batches(clean, bank.images)
        planted = PlantedEncoder(clean, embeddings[bank.labels == target].mean(dim=0) - embeddings.mean(dim=0))

        def reaction(encoder):
            known = unit(embed_in_batches(encoder, bank.images))
            raw = [embed_in_batches(encoder, images) for images in (test.images, trigger(test.images))]
            return EncoderOutputs(*raw, *(knn_predictions(known, bank.labels, unit(r), 6, k=20) for r in raw))

        result = report(reaction(clean), reaction(planted), test.labels, target)
    assert result.asr == 1.0
    assert result.asr_clean_encoder < 0.3
    assert abs(result.backdoored_accuracy - result.clean_accuracy) < 0.05
    assert result.cos_triggered > 0.95 > result.cos_clean
