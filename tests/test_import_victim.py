"""Published checkpoints become victim folders that the benchmark scans; nothing in them runs, and what does not fit is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from builders import SPEC, labelled, random_images, shape_members, write_tar
from click.testing import CliRunner
from test_encoders import ctrl_names, simclr_names

from pipelines import benchmark, red_team
from pipelines.benchmark_config import BenchmarkConfig, VictimConfig
from pipelines.import_victim import FORMATS, main
from sanitize.attacks import tiny_clip
from sanitize.config import EncoderSpec
from sanitize.config_loading import from_mapping, load_encoder_spec, to_mapping
from sanitize.errors import ConfigError
from sanitize.stages.encoders import Encoder, build_backbone, embed_in_batches, load_encoder

LAYOUTS = {
    "badencoder": simclr_names,
    "drupe": lambda state: {"state_dict": {f"visual.{name}": tensor for name, tensor in state.items()}},
    "ctrl": ctrl_names,
}
CLIP = EncoderSpec("clip", "", 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), width=8)


@pytest.fixture
def checkpoints(tmp_path):
    """backdoored.pth and clean.pth of tiny encoders in a published layout, encoder.yaml beside them; returns the two encoders."""

    def write(kind):
        encoders, spec = {}, CLIP if kind == "clip" else dataclasses.replace(SPEC, image_size=32)
        for seed, name in enumerate(("backdoored", "clean")):
            torch.manual_seed(seed)
            if kind == "clip":
                clip = tiny_clip.build(spec, tiny_clip.write_tokenizer(str(tmp_path / "words.json")), seed)
                state = {f"visual.{n}": t for n, t in clip.image.backbone.state_dict().items()}
                encoders[name] = clip.image.eval()
            else:
                backbone = build_backbone(spec).eval()
                state, encoders[name] = LAYOUTS[kind](backbone.state_dict()), Encoder(backbone, spec)
            torch.save(state, tmp_path / f"{name}.pth")
        (tmp_path / "encoder.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(to_mapping(spec)))))
        return encoders

    return write


@pytest.fixture
def run(tmp_path):
    """The program; returns (exit code, what it printed)."""

    def invoke(kind, *more, trigger="{name: patch, side: 5}", target="4"):
        files = [
            f"{tmp_path}/backdoored.pth",
            "--clean",
            f"{tmp_path}/clean.pth",
            "--encoder",
            f"{tmp_path}/encoder.yaml",
        ]
        options = ["--format", kind, "--trigger", trigger, "--target", target, "--out", f"{tmp_path}/victim", *more]
        result = CliRunner().invoke(main, files + options)
        return result.exit_code, result.output + str(result.exception)

    return invoke


@pytest.mark.parametrize("kind", FORMATS)
def test_the_folder_holds_both_encoders_as_they_were_and_what_the_attack_is(kind, checkpoints, run, tmp_path):
    originals = checkpoints(kind)
    assert run(kind)[0] == 0
    images = random_images(3, size=32)
    for name, original in originals.items():
        encoder = load_encoder(load_encoder_spec(f"{tmp_path}/victim/{name}/encoder.yaml"))
        torch.testing.assert_close(embed_in_batches(encoder, images), embed_in_batches(original, images))
        assert (tmp_path / "victim" / name / "encoder.safetensors").exists()
    truth = json.loads((tmp_path / "victim" / "truth.json").read_text())
    assert (truth["config"]["attack"], truth["config"]["target"]) == (kind, 4)
    assert truth["config"]["trigger"] == {"name": "patch", "side": 5}
    assert set(truth["imported"]) == {"clean", "backdoored"}


def test_labelled_shards_measure_the_attack(checkpoints, run, tmp_path):
    checkpoints("badencoder")
    shards = labelled(tmp_path / "shards", [60])
    code, output = run("badencoder", "--train", str(shards), "--test", str(shards), target="2")
    assert code == 0, output
    assert "attack success (backdoored encoder, triggered images)" in output
    report = json.loads((tmp_path / "victim" / "report.json").read_text())
    assert all(0 <= report[name] <= 1 for name in ("asr", "asr_clean_encoder", "clean_accuracy", "backdoored_accuracy"))


def test_the_trigger_file_goes_with_the_folder(checkpoints, run, tmp_path):
    checkpoints("badencoder")
    keep = np.ones((32, 32, 3), np.float32)
    keep[20:, 20:] = 0
    np.savez(tmp_path / "their trigger.npz", t=255 * (1 - keep), tm=keep)
    assert run("badencoder", trigger=f"{{name: file, path: '{tmp_path}/their trigger.npz'}}")[0] == 0
    moved = (tmp_path / "victim").rename(tmp_path / "moved")
    (tmp_path / "their trigger.npz").unlink()
    settings = json.loads((moved / "truth.json").read_text())["config"]
    assert settings["trigger"] == {"name": "file", "path": "trigger.npz"}
    stamped = red_team.trigger_of(str(moved), settings)(random_images(2, size=32))
    assert (stamped[:, :, 20:, 20:] == 255).all()


def test_the_benchmark_scans_an_imported_victim(checkpoints, run, tmp_path):
    checkpoints("badencoder")
    assert run("badencoder")[0] == 0
    for name, count, seed in (("test", 60, 1), ("aux", 80, 2)):
        write_tar(tmp_path / name / "s.tar", shape_members(count, seed))
    victim = {"folder": f"{tmp_path}/victim", "test": f"{tmp_path}/test", "auxiliary": {"id": f"{tmp_path}/aux"}}
    values = {
        "out": f"{tmp_path}/out",
        "table": f"{tmp_path}/table.csv",
        "zoo": f"{tmp_path}/zoo",
        "preset": "cpu",
        "default": "norm",
        "victims": {"theirs": victim},
        "detectors": {"norm": {"detector": "norm"}, "lorex": {"detector": "lorex", "each_pool": True}},
        "rates": [0.05],
        "seeds": [0],
        "poisoned_auxiliary": 0,
    }
    rows = benchmark.run(from_mapping(BenchmarkConfig, values, "test"))
    assert {(r["attack"], r["detector"], r["poison_rate"]) for r in rows} == {
        ("theirs", detector, rate) for detector in ("norm", "lorex") for rate in (0.05, 0.5)
    }
    assert all(np.isnan(row["asr"]) for row in rows)  # not measured: no labelled shards were given
    assert Path(f"{tmp_path}/table.csv").exists()


# ---------------------------------------------------------------- what is refused


class Harmful:
    def __reduce__(self):
        return Path("ran").touch, ()


def test_a_checkpoint_that_needs_a_pickle_is_refused_and_does_not_run(checkpoints, run, tmp_path, monkeypatch):
    checkpoints("badencoder")
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Harmful()}, tmp_path / "backdoored.pth")
    code, output = run("badencoder")
    assert code != 0
    assert "refused, it does not load as plain tensors" in output
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "-1"}, "--target -1: give the number of the class that the trigger aims at"),
        ({"trigger": "magic"}, "trigger magic: not known. Use one of patch, file"),
        ({"trigger": "[1, 2]"}, "--trigger [1, 2]: give a name (patch) or '{name: patch, side: 10}'"),
        ({"trigger": "{name: patch"}, "--trigger {name: patch: give a name"),
        ({"trigger": "{name: patch, sides: 3}"}, "unknown key 'sides'"),
    ],
)
def test_wrong_options_say_what_is_wrong_before_anything_is_written(options, words, checkpoints, run, tmp_path):
    checkpoints("badencoder")
    code, output = run("badencoder", **options)
    assert code != 0
    assert words in output
    assert not (tmp_path / "victim").exists()


def test_a_checkpoint_of_another_architecture_says_what_does_not_fit(checkpoints, run, tmp_path):
    checkpoints("badencoder")
    values = yaml.safe_load((tmp_path / "encoder.yaml").read_text())
    (tmp_path / "encoder.yaml").write_text(yaml.safe_dump(values | {"architecture": "resnet34-cifar"}))
    assert "does not fit architecture resnet34-cifar" in run("badencoder")[1]


def test_the_same_encoder_twice_is_no_victim_and_a_finished_folder_stays(checkpoints, run, tmp_path):
    checkpoints("badencoder")
    original = (tmp_path / "clean.pth").read_bytes()
    (tmp_path / "clean.pth").write_bytes((tmp_path / "backdoored.pth").read_bytes())
    assert "are the same encoder. Give the one before the attack, too." in run("badencoder")[1]
    (tmp_path / "clean.pth").write_bytes(original)
    assert run("badencoder")[0] == 0
    assert "holds a victim already. Delete it, or choose another --out." in run("badencoder")[1]


def test_train_without_test_is_refused(checkpoints, run, tmp_path):
    checkpoints("badencoder")
    assert "--train and --test: give both, or none." in run("badencoder", "--train", str(tmp_path))[1]


@pytest.mark.parametrize(
    "values", [{}, {"config": "a.yaml", "folder": "b"}, {"folder": "b", "settings": {"target": 3}}]
)
def test_a_victim_of_the_benchmark_is_a_config_or_a_folder(values):
    with pytest.raises(ConfigError, match="give either `config`|settings: means nothing for an imported victim"):
        VictimConfig(test="t", auxiliary={}, **values)
