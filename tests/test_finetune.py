"""Fine-tuning: what it writes, the same curve for any number of workers, resumption, and wrong use. Tiny models, real shards."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from builders import encoded, random_image, tree_bytes, write_encoder, write_tar
from click.testing import CliRunner

from sanitize import storage
from sanitize.artifacts.encoder_folder import save_clip
from sanitize.artifacts.head_folder import load_head
from sanitize.attacks import tiny_clip
from sanitize.cli import main
from sanitize.commands.finetune import _classes, _course, _objective, _sources, _train_here, finetune
from sanitize.config import EncoderSpec, FinetuneConfig
from sanitize.config_loading import load_encoder_spec
from sanitize.errors import CheckpointError, ConfigError, RefusedError, SanitizeError
from sanitize.runtime import Resources
from sanitize.stages.encoders import load_encoder
from sanitize.stages.shards import list_shards
from sanitize.training.clip import load_clip
from sanitize.training.data import index_sources
from sanitize.training.distributed import Rank
from sanitize.training.objectives import require_lanes

CLASSES = 3


def image(label: int, seed: int) -> np.ndarray:
    """A random image tinted by its class: easy to learn."""
    pixels = random_image(seed).astype(int) // 2
    pixels[..., label] += 120
    return pixels.clip(0, 255).astype(np.uint8)


def labelled(folder: Path, counts: list[int], first_seed: int = 0, broken: int = 0) -> Path:
    """Shards of tinted images with their class; the first `broken` images cannot be decoded."""
    seed = first_seed
    for number, count in enumerate(counts):
        members = []
        for _ in range(count):
            label = seed % CLASSES
            data = b"broken" if seed - first_seed < broken else encoded(image(label, seed))
            members += [(f"s{seed:05d}.cls", str(label).encode()), (f"s{seed:05d}.png", data)]
            seed += 1
        write_tar(folder / f"part-{number:03d}.tar", members)
    return folder


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    return labelled(tmp_path_factory.mktemp("clean"), [70, 3, 1, 22])


@pytest.fixture(scope="module")
def validation(tmp_path_factory) -> Path:
    return labelled(tmp_path_factory.mktemp("validation"), [20, 10], first_seed=5000)


@pytest.fixture(scope="module")
def tiny_clip_spec(tmp_path_factory) -> EncoderSpec:
    folder = tmp_path_factory.mktemp("clip")
    words = str(folder / "words.json")
    spec = EncoderSpec("clip", "", 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), width=8, tokenizer=words)
    save_clip(tiny_clip.build(spec, tiny_clip.write_tokenizer(words), seed=0), str(folder))
    return load_encoder_spec(str(folder / "encoder.yaml"))


def captioned(folder: Path, counts: list[int], seed: int = 0) -> Path:
    pairs = tiny_clip.coloured_shapes(sum(counts), seed)
    number = 0
    for shard, count in enumerate(counts):
        members = []
        for _ in range(count):
            pixels = pairs.images[number].permute(1, 2, 0).numpy()
            members += [
                (f"s{number:05d}.cls", str(int(pairs.labels[number])).encode()),
                (f"s{number:05d}.png", encoded(pixels)),
                (f"s{number:05d}.txt", pairs.captions[number].encode()),
            ]
            number += 1
        write_tar(folder / f"part-{shard:03d}.tar", members)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return captioned(tmp_path_factory.mktemp("pairs"), [50, 1, 13])


@pytest.fixture
def make(clean, encoder_spec, tmp_path):
    """Settings of a small training in this process; keywords override."""

    def build(out: str = "head", **changes) -> FinetuneConfig:
        values = {
            "shards": (str(clean),),
            "encoder": encoder_spec,
            "out": str(tmp_path / out),
            "epochs": 3,
            "batch_size": 16,
            "lanes": 6,
            "precision": "fp32",
            "workers": 0,
            "cpus_per_worker": 1,
        }
        return FinetuneConfig(**(values | changes))

    return build


def losses(result) -> list[float]:
    return [line["loss"] for line in result.epochs]


def comparable(folder: Path) -> dict[str, bytes]:
    """Files of a finished training without the two that hold seconds."""
    return {k: v for k, v in tree_bytes(folder).items() if k not in ("metrics.jsonl", "finetune.json")}


# ---------------------------------------------------------------- what it does


@pytest.mark.parametrize("mode", ["linear", "mlp"])
def test_a_head_learns_and_is_written_with_its_class_names(make, validation, tmp_path, encoder_spec, mode):
    names = ("red", "green", "blue")
    config = make(mode=mode, validation=(str(validation),), classes=names, epochs=15, learning_rate=1e-2)
    result = finetune(config)
    assert losses(result)[-1] < 0.5 * losses(result)[0]
    assert result.samples == 96
    assert result.evaluation["clean_accuracy"] > 0.7
    assert result.evaluation["knn_accuracy"] > 0.5
    assert sorted(p.name for p in (tmp_path / "head").iterdir()) == [
        "finetune.json",
        "head.json",
        "head.safetensors",
        "metrics.jsonl",
        "run.json",
    ]
    lines = [json.loads(line) for line in (tmp_path / "head" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 16))
    assert {"loss", "learning_rate", "samples", "samples_per_second", "validation_accuracy"} <= set(lines[0])
    assert load_head(config.out, load_encoder(encoder_spec)).classes == names


def test_full_fine_tuning_changes_the_encoder_which_loads_with_its_head(make, validation, tmp_path, encoder_spec):
    config = make(mode="full", validation=(str(validation),), augment=True, epochs=6, learning_rate=3e-3)
    result = finetune(config)
    assert losses(result)[-1] < losses(result)[0]
    tuned = load_encoder(load_encoder_spec(str(tmp_path / "head" / "encoder.yaml")))
    assert tuned.fingerprint() != load_encoder(encoder_spec).fingerprint()
    head = load_head(config.out, tuned)
    shown = torch.stack([torch.from_numpy(image(label, 9000 + label)) for label in range(3)]).permute(0, 3, 1, 2)
    assert head.predictions(tuned(shown.float() / 255)).shape == (3,)
    assert result.evaluation["clean_accuracy"] == pytest.approx(result.epochs[-1]["validation_accuracy"], abs=0.04)


def test_a_clip_learns_from_captions_and_loads_again_with_its_tokenizer(make, pairs, tiny_clip_spec, tmp_path):
    held_out = captioned(tmp_path / "held-out", [30], seed=9)
    config = make(
        mode="contrastive",
        encoder=tiny_clip_spec,
        shards=(str(pairs),),
        validation=(str(held_out),),
        classes=tuple(tiny_clip.COLOURS),
        prompts=tiny_clip.PROMPTS,
        learning_rate=2e-3,
        epochs=4,
    )
    result = finetune(config)
    assert losses(result)[-1] < losses(result)[0]
    assert {"validation_loss", "validation_retrieval"} <= set(result.epochs[0])
    assert 0 <= result.evaluation["clean_accuracy"] <= 1
    tuned = load_clip(load_encoder_spec(str(tmp_path / "head" / "encoder.yaml")))
    assert tuned.image.fingerprint() != load_clip(tiny_clip_spec).image.fingerprint()
    assert tuned.text(["a photo of a red circle"]).shape == (1, 64)


def test_attack_success_is_reported_with_and_without_the_target_class(make, validation, tmp_path):
    triggered = tmp_path / "triggered"
    members = []
    for number in range(30):
        pixels = image(number % CLASSES, 5000 + number)
        pixels[:] = image(0, number)  # a trigger that makes every image look like class 0
        members += [(f"t{number:03d}.cls", str(number % CLASSES).encode()), (f"t{number:03d}.png", encoded(pixels))]
    write_tar(triggered / "t.tar", members)
    config = make(validation=(str(validation),), triggered=(str(triggered),), target=0, epochs=15, learning_rate=1e-2)
    evaluation = finetune(config).evaluation
    assert evaluation["attack_success"] > 0.7
    assert evaluation["attack_success_with_target"] > 0.7


def test_early_stop_keeps_the_best_epoch(make, validation, tmp_path):
    config = make(validation=(str(validation),), epochs=60, patience=3, learning_rate=1e-2)
    result = finetune(config)
    accuracy = [line["validation_accuracy"] for line in result.epochs]
    assert len(accuracy) < 60
    assert len(accuracy) == int(np.argmax(accuracy)) + 1 + 3
    assert result.evaluation["clean_accuracy"] == pytest.approx(max(accuracy))


@pytest.mark.parametrize("mode", ["linear", "full"])
def test_broken_images_are_left_out_and_counted(make, encoder_spec, tmp_path, mode):
    shards = labelled(tmp_path / "in", [30, 9], broken=4)
    result = finetune(make(mode=mode, shards=(str(shards),)))
    assert (result.samples, result.unreadable) == (35, 4)
    assert np.isfinite(losses(result)).all()


@pytest.mark.parametrize("mode", ["full", "linear"])
def test_accumulation_gives_the_same_result(make, mode):
    whole = finetune(make("a", mode=mode))
    parts = finetune(make("b", mode=mode, accumulate=3))
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)


def test_a_shard_that_cannot_be_read_is_left_out_and_named(make, clean, tmp_path):
    (tmp_path / "bad.tar").write_bytes(b"<html>")
    result = finetune(make(shards=(str(clean), str(tmp_path / "bad.tar"))))
    assert result.samples == 96
    assert "bad.tar: not a tar archive" in result.failed[0]


def test_the_command_works_as_documented(make, clean, encoder_yaml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["finetune", str(clean), "--encoder", str(encoder_yaml), "--workers", "0", "--epochs", "2"]
    result = CliRunner().invoke(main, [*arguments, "--set", "precision=fp32"])
    assert result.exit_code == 0, result.output
    assert "head: linear trained on 96 samples, 0 left out, last loss " in result.output
    assert "Example:  sanitize finetune scanned/clean" in CliRunner().invoke(main, ["finetune", "--help"]).output


# ---------------------------------------------------------------- any number of workers


def ddp_rank(rank: int, world: int, course, folder: str) -> None:
    """One rank of a training without Ray: what Ray Train does, in a process of its own."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
    _train_here(course, Rank(rank, world, torch.device("cpu")), folder, print)
    torch.distributed.destroy_process_group()


def course_of(config: FinetuneConfig):
    """What the workers of a training get."""
    sets = {name: list_shards(getattr(config, name)) for name in ("shards", "validation", "triggered")}
    resources = Resources(0, 1, 0)
    sources = index_sources(config, _sources(config, sets), f"{config.out}/cache", resources)
    fingerprint = load_encoder(config.encoder).fingerprint()
    classes = len(_classes(config, sources))
    return _course(config, fingerprint, sources, classes, f"{config.out}/cache", resources)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mlp", "full", "contrastive"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_give_the_loss_curve_of_one_process(
    make, validation, pairs, tiny_clip_spec, tmp_path, mode, world
):
    """Uneven shards, a batch size that ranks cannot share evenly, broken images, accumulation, augmentation."""
    changes = {"mode": mode, "epochs": 2, "batch_size": 17, "accumulate": 2, "augment": mode == "full"}
    if mode == "contrastive":
        changes |= {
            "encoder": tiny_clip_spec,
            "shards": (str(pairs),),
            "learning_rate": 1e-3,
            "validation": (str(pairs),),
        }
    else:
        shards = labelled(tmp_path / "in", [60, 1, 4], broken=2)
        changes |= {"shards": (str(shards),), "validation": (str(validation),), "learning_rate": 1e-3}
    course = course_of(make("x", **changes))
    curves = []
    for ranks in (1, world):
        folder = tmp_path / f"ranks-{ranks}"
        folder.mkdir()
        torch.multiprocessing.spawn(ddp_rank, (ranks, course, str(folder)), nprocs=ranks)
        saved = torch.load(folder / "last.pt", weights_only=True)["state"]["metrics"]
        curves.append([(line["loss"], line["validation_loss"], line["samples"]) for line in saved])
    assert np.array(curves[1]) == pytest.approx(np.array(curves[0]), rel=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "workers"), [("mlp", 1), ("full", 2)])
def test_ray_train_gives_the_curve_of_one_process(
    make, validation, ray_cluster, encoder_spec, monkeypatch, mode, workers
):
    """Weights by a relative path: workers start in another folder."""
    weights = Path(encoder_spec.weights)
    monkeypatch.chdir(weights.parent)
    relative = dataclasses.replace(encoder_spec, weights=weights.name)
    changes = {"encoder": relative, "mode": mode, "validation": (str(validation),), "epochs": 2, "learning_rate": 1e-3}
    here = finetune(make("here", **changes))
    there = finetune(make("there", workers=workers, **changes))
    assert losses(there) == pytest.approx(losses(here), rel=1e-4)
    assert there.evaluation == pytest.approx(here.evaluation)


def test_one_shard_feeds_several_workers(make, tmp_path):
    """Lanes are cut inside shards: fewer shards than workers is no special case."""
    shards = labelled(tmp_path / "in", [40])
    course = course_of(make(shards=(str(shards),), mode="full", batch_size=10))
    read = []
    for rank in range(3):
        batches = list(_objective(course).batches(0, 0, Rank(rank, 3, torch.device("cpu"))))
        assert len(batches) == 4
        read += [p.index for batch in batches for piece in batch.pieces for p in piece.usable]
    assert sorted(read) == list(range(40))


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("mode", ["mlp", "full", "contrastive"])
def test_a_training_that_is_killed_resumes_to_the_same_result(
    make, validation, pairs, tiny_clip_spec, tmp_path, monkeypatch, mode
):
    """Killed right after the first checkpoint within an epoch."""
    changes = {"mode": mode, "validation": (str(validation),), "checkpoint_steps": 2, "patience": 9}
    if mode == "contrastive":
        changes |= {"encoder": tiny_clip_spec, "shards": (str(pairs),), "validation": (str(pairs),)}
    whole = finetune(make("whole", **changes))
    real = storage.write_bytes

    def dies(path, data):
        real(path, data)
        if path.endswith("last.pt"):
            raise KeyboardInterrupt

    monkeypatch.setattr(storage, "write_bytes", dies)
    for _ in range(3):  # each time it gets one checkpoint further
        with pytest.raises(KeyboardInterrupt):
            finetune(make("killed", **changes))
    monkeypatch.setattr(storage, "write_bytes", real)
    resumed = finetune(make("killed", **changes))
    assert losses(resumed) == losses(whole)
    assert resumed.evaluation == whole.evaluation
    assert comparable(tmp_path / "killed") == comparable(tmp_path / "whole")


@pytest.mark.slow
def test_sigkill_and_the_same_command_give_the_same_final_metrics(clean, validation, encoder_yaml, tmp_path):
    def command(out: str) -> list[str]:
        arguments = [clean, "--encoder", encoder_yaml, "--validation", validation, "--out", tmp_path / out]
        arguments += ["--mode", "full", "--workers", 0, "--cpus-per-worker", 1, "--epochs", 40, "--precision", "fp32"]
        arguments += ["--batch-size", 8, "--set", "checkpoint_steps=3"]
        return [sys.executable, "-m", "sanitize.cli", "finetune", *(str(a) for a in arguments)]

    subprocess.run(command("whole"), check=True, capture_output=True)
    process = subprocess.Popen(command("killed"), stderr=subprocess.DEVNULL)
    last = tmp_path / "killed" / "training" / "last.pt"
    end = time.monotonic() + 120
    while not last.exists():
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "finetune.json").exists()
    subprocess.run(command("killed"), check=True, capture_output=True)
    assert comparable(tmp_path / "killed") == comparable(tmp_path / "whole")
    results = [json.loads((tmp_path / out / "finetune.json").read_text()) for out in ("killed", "whole")]
    assert results[0]["evaluation"] == results[1]["evaluation"]


def test_running_a_finished_training_again_changes_nothing(make, tmp_path):
    first = finetune(make())
    before = tree_bytes(tmp_path / "head")
    assert finetune(make()) == first
    assert tree_bytes(tmp_path / "head") == before


# ---------------------------------------------------------------- wrong use


def test_an_empty_clean_set_says_so(make, tmp_path):
    write_tar(tmp_path / "in" / "empty.tar", [])
    with pytest.raises(ConfigError, match=r"shards: no usable sample in 1 shard.*Did cleaning remove everything"):
        finetune(make(shards=(str(tmp_path / "in"),)))
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match=r"none: no \.tar file found"):
        finetune(make(shards=(str(tmp_path / "none"),)))


def test_shards_without_labels_say_which_member_was_looked_for(make, tmp_path):
    write_tar(tmp_path / "in" / "s.tar", [("a.png", encoded(random_image(0))), ("a.txt", b"words")])
    with pytest.raises(ConfigError, match=r"sample 'a' has no label: no \.cls member \(it has png txt\)"):
        finetune(make(shards=(str(tmp_path / "in"),)))


def test_after_a_wrong_label_member_the_right_one_needs_no_other_folder(make, tmp_path):
    members = [(f"s{n}.png", encoded(image(n % 2, n))) for n in range(12)]
    members += [(f"s{n}.json", json.dumps({"label": n % 2}).encode()) for n in range(12)]
    shard = write_tar(tmp_path / "in" / "s.tar", sorted(members))
    with pytest.raises(ConfigError, match=r"has no label: no \.cls member"):
        finetune(make(shards=(str(shard),)))
    assert finetune(make(shards=(str(shard),), label_member="json:label")).samples == 12


def test_images_that_cannot_be_decoded_say_so(make, tmp_path):
    shards = labelled(tmp_path / "in", [6], broken=6)
    with pytest.raises(SanitizeError, match="none of the 6 samples can be decoded"):
        finetune(make(shards=(str(shards),), mode="full"))
    with pytest.raises(ConfigError, match="shards: none of its 6 images can be decoded"):
        finetune(make("other", shards=(str(shards),)))


def test_shards_without_captions_say_so(make, clean, tiny_clip_spec):
    with pytest.raises(
        ConfigError, match=r"96 no_caption\). No caption was found as txt: name its member with --caption"
    ):
        finetune(make(mode="contrastive", encoder=tiny_clip_spec))


def test_a_class_count_that_does_not_fit_says_so(make, validation, tmp_path):
    with pytest.raises(
        ConfigError, match=r"classes: a sample has the label 2, but there are 2 classes \(labels 0 to 1\)"
    ):
        finetune(make(classes=("a", "b")))
    write_tar(tmp_path / "v" / "s.tar", [("a.png", encoded(random_image(0))), ("a.cls", b"7")])
    with pytest.raises(ConfigError, match=r"validation: a sample has the label 7, but there are 3 classes"):
        finetune(make("other", validation=(str(tmp_path / "v"),)))
    with pytest.raises(ConfigError, match="target: 3, but there are 3 classes"):
        finetune(make("third", triggered=(str(validation),), target=3))


def test_more_workers_than_lanes_says_how_many_can_work(make, tmp_path):
    config = make(shards=(str(labelled(tmp_path / "in", [5])),), mode="full", lanes=1)
    data = course_of(config).training
    require_lanes(config, data, 1)
    with pytest.raises(
        ConfigError, match=r"2 workers share 1 lanes \(5 samples, lanes=1\).* Give --workers 1 or fewer"
    ):
        require_lanes(config, data, 2)


def test_the_folder_of_another_run_is_refused(make, tmp_path):
    finetune(make())
    with pytest.raises(RefusedError, match="head: holds a training that differs in seed. Give another --out"):
        finetune(make(seed=5))
    (tmp_path / "head" / "run.json").unlink()
    (tmp_path / "head" / "training").mkdir()
    (tmp_path / "head" / "training" / "last.pt").write_bytes(b"x")
    with pytest.raises(RefusedError, match=r"holds checkpoints of an unknown training \(no run.json\)"):
        finetune(make())


def test_another_encoder_in_the_same_folder_is_refused(make, tmp_path):
    finetune(make())
    other = load_encoder_spec(str(write_encoder(tmp_path / "other", seed=1)))
    with pytest.raises(RefusedError, match="holds a training that differs in encoder"):
        finetune(make(encoder=other))
    with pytest.raises(CheckpointError, match="its head was trained on another encoder"):
        load_head(str(tmp_path / "head"), load_encoder(other))


def test_divergence_is_an_error_not_a_head(make, tmp_path):
    with pytest.raises(SanitizeError, match=r"training diverged in epoch \d .*Lower --learning-rate"):
        finetune(make(mode="full", learning_rate=1e30))
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
def test_wrong_settings_say_what_to_change(make, changes, words):
    with pytest.raises(ConfigError, match=words):
        make(**changes)
