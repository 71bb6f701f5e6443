"""`sanitize finetune`: clean shards + encoder → a head (linear, mlp), encoder and head (full), or a CLIP (contrastive).

index the samples → embed them once (linear, mlp) or stream them (full, contrastive) → train → measure → write the folder.
"""

import contextlib
import dataclasses
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import nn

from sanitize import checkpoint, runtime, storage
from sanitize.config import FinetuneConfig, check, placed, to_mapping
from sanitize.errors import RefusedError
from sanitize.learning import Objective, State, Training, finished_training
from sanitize.material import Material, Source, embedded, indexed
from sanitize.objectives import (
    ContrastiveObjective,
    Features,
    FullObjective,
    HeadObjective,
    require_lanes,
)
from sanitize.progress import ProgressDisplay
from sanitize.ranks import Place, Report, train_on_ray
from sanitize.records import Shard
from sanitize.runtime import Resources
from sanitize.stages.contrastive import load_clip
from sanitize.stages.encoders import load_encoder
from sanitize.stages.sample_index import DataSet, class_count
from sanitize.stages.shards import head_tail_sha256, list_shards
from sanitize.stages.text import load_text_encoder
from sanitize.trained import evaluate, write_trained

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneResult:
    """samples: that were trained on. unreadable: whose picture or caption turned out to be broken; unusable: the others left
    out, by reason. epochs: the lines of metrics.jsonl. evaluation: of the final weights, rates in [0, 1]. failed: one message
    for each shard that was left out or is damaged."""

    out: str
    mode: str
    samples: int
    unreadable: int
    unusable: dict[str, int]
    classes: tuple[str, ...]
    epochs: tuple[dict[str, float], ...]
    evaluation: dict[str, float]
    failed: tuple[str, ...]


@dataclass(frozen=True)
class Course:
    """What every worker needs to build the objective; plain data, put into Ray's object store once."""

    config: FinetuneConfig
    classes: int
    training: DataSet | Features
    validation: DataSet | Features | None
    threads: int


def finetune(config: FinetuneConfig) -> FinetuneResult:
    """Train on the shards, measure on the validation shards, write `config.out`. After a kill the same call goes on."""
    sets = {name: list_shards(getattr(config, name)) for name in ("shards", "validation", "triggered")}
    config = dataclasses.replace(config, encoder=placed(config.encoder))
    fingerprint = load_encoder(config.encoder).fingerprint()
    if config.mode == "contrastive":
        load_text_encoder(config.encoder)  # fail here, not in a worker
    run = _identity(config, fingerprint, sets)
    _refuse_other_run(config.out, run)
    done = storage.join(config.out, "finetune.json")
    if storage.exists(done):
        log.info("%s holds this training already", config.out)
        return _result(config, storage.read_json(done))
    resources = runtime.plan(
        config.workers, config.cpus_per_worker, config.gpus_per_worker, len(sets["shards"]), config.address
    )
    with runtime.ray_session(config.address) if resources.workers else contextlib.nullcontext():
        cache = storage.absolute(storage.join(config.out, "cache", storage.json_sha256(run)[:16]))
        materials = indexed(config, _sources(config, sets), cache, resources)
        classes = _classes(config, materials)
        storage.write_json(storage.join(config.out, "run.json"), run)  # not before labels and classes are known to fit
        course = _course(config, fingerprint, materials, len(classes), cache, resources)
        model, state = _train(config, course, resources)
        trained = write_trained(config, model, fingerprint, classes)
        bank = course.training if isinstance(course.training, Features) else None
        evaluation = evaluate(config, trained, classes, materials, bank, cache, resources)
    return _finish(config, materials, classes, state, evaluation)


def _identity(config: FinetuneConfig, fingerprint: str, sets: dict[str, list[Shard]]) -> dict[str, Any]:
    """What makes this run this run: settings, inputs, encoder; not where and on how many workers it happens."""
    placement = ("workers", "gpus_per_worker", "cpus_per_worker", "address", "out", "checkpoint_steps")
    settings = {key: value for key, value in to_mapping(config).items() if key not in placement}
    both_towers = storage.file_sha256(config.encoder.weights) if config.mode == "contrastive" else ""
    with ThreadPoolExecutor(16) as pool:
        inputs = {
            name: dict(zip((s.stem for s in shards), pool.map(head_tail_sha256, shards), strict=True))
            for name, shards in sets.items()
        }
    run: dict[str, Any] = json.loads(json.dumps(settings | inputs | {"encoder": [fingerprint, both_towers]}))
    return run


def _refuse_other_run(out: str, run: dict[str, Any]) -> None:
    """A folder never mixes two trainings; run.json remembers which it holds."""
    path = storage.join(out, "run.json")
    before = storage.read_json(path) if storage.exists(path) else {}
    changed = sorted(key for key in run if before and run[key] != before.get(key))
    if changed:
        raise RefusedError(
            f"{out}: holds a training that differs in {', '.join(changed)}. Give another --out, or delete the folder "
            "to train again."
        )
    if not before and storage.exists(storage.join(out, "training", "last.pt")):
        raise RefusedError(
            f"{out}: holds checkpoints of an unknown training (no run.json). Give another --out, or delete the folder."
        )
    storage.remove_partials(out)


# ---------------------------------------------------------------- what is trained on


def _sources(config: FinetuneConfig, sets: dict[str, list[Shard]]) -> list[Source]:
    """Labels are needed for heads, and of a CLIP only to measure zero-shot classes; captions only to train and validate a CLIP."""
    contrastive = config.mode == "contrastive"
    sources = []
    for name, shards in sets.items():
        label_member = "" if contrastive and (name == "shards" or not config.classes) else config.label_member
        caption_member = config.caption_member if contrastive and name != "triggered" else ""
        sources += [Source(name, tuple(shards), label_member, caption_member)] if shards else []
    return sources


def _classes(config: FinetuneConfig, materials: dict[str, Material]) -> tuple[str, ...]:
    """Names in the order of the labels. Raises ConfigError when a label has none."""
    names = config.classes
    if config.mode != "contrastive":
        count = class_count(names, materials["shards"].data.labels, "classes")
        names = names or tuple(str(label) for label in range(count))
    for name in ("validation", "triggered"):
        if name in materials and names:
            class_count(names, materials[name].data.labels, name)
    check(
        config.target < max(len(names), 1) or not names,
        f"target: {config.target}, but there are {len(names)} classes (labels 0 to {len(names) - 1}). Correct --target.",
    )
    return names


def _course(
    config: FinetuneConfig,
    fingerprint: str,
    materials: dict[str, Material],
    classes: int,
    cache: str,
    resources: Resources,
) -> Course:
    training, validation = materials["shards"].data, materials.get("validation")
    if config.mode in ("full", "contrastive"):
        require_lanes(config, training, resources.workers)
        return Course(config, classes, training, validation.data if validation else None, resources.cpus)
    features = embedded(config, config.encoder, fingerprint, list(materials.values()), cache, resources)
    return Course(config, classes, features["shards"], features.get("validation"), resources.cpus)


def _objective(course: Course) -> Objective:
    config, training, validation = course.config, course.training, course.validation
    if isinstance(training, Features):
        assert validation is None or isinstance(validation, Features)
        return HeadObjective(config, course.classes, training, validation)
    assert not isinstance(validation, Features)
    if config.mode == "full":
        encoder = load_encoder(config.encoder)
        return FullObjective(config, course.classes, encoder, training, validation, course.threads)
    return ContrastiveObjective(config, load_clip(config.encoder), training, validation, course.threads)


# ---------------------------------------------------------------- training


def _train(config: FinetuneConfig, course: Course, resources: Resources) -> tuple[nn.Module, State]:
    """The model with its final weights, on the CPU."""
    folder = storage.absolute(storage.join(config.out, "training"))
    with ProgressDisplay("finetune", config.epochs, config.epochs, "epochs") as display:

        def show(values: dict[str, Any]) -> None:
            display.skip(values["first"])
            display.update(int(values["epochs"]), values["epochs"], values["samples"], values["note"])

        if resources.workers == 0:
            with runtime.torch_threads(resources.cpus):
                _train_here(course, Place(0, 1, runtime.device()), folder, show)
        else:

            def loop(shared: Course, place: Place, report: Report) -> None:
                _train_here(shared, place, folder, report)

            train_on_ray(loop, course, resources, folder, show)
    model = _objective(course).model
    return model, finished_training(config, model, folder)


def _train_here(course: Course, place: Place, folder: str, report: Report) -> None:
    Training(course.config, _objective(course), place, folder, report).run()


# ---------------------------------------------------------------- result


def _finish(
    config: FinetuneConfig,
    materials: dict[str, Material],
    classes: tuple[str, ...],
    state: State,
    evaluation: dict[str, float],
) -> FinetuneResult:
    """Write finetune.json, the mark of a finished training, and delete what only served to get there."""
    training = materials["shards"]
    samples = int(state.metrics[-1]["samples"])
    values = {
        "mode": config.mode,
        "samples": samples,
        "unreadable": len(training.data) - samples,
        "unusable": dict(training.unusable),
        "classes": list(classes),
        "epochs": state.metrics,
        "evaluation": evaluation,
        "failed": sorted(message for material in materials.values() for message in material.failed),
        "versions": checkpoint.library_versions(),
    }
    storage.write_json(storage.join(config.out, "finetune.json"), values)
    storage.remove_folder(storage.join(config.out, "cache"))
    storage.remove_folder(storage.join(config.out, "training"))
    return _result(config, storage.read_json(storage.join(config.out, "finetune.json")))


def _result(config: FinetuneConfig, values: dict[str, Any]) -> FinetuneResult:
    return FinetuneResult(
        out=config.out,
        mode=values["mode"],
        samples=values["samples"],
        unreadable=values["unreadable"],
        unusable=values["unusable"],
        classes=tuple(values["classes"]),
        epochs=tuple(values["epochs"]),
        evaluation=values["evaluation"],
        failed=tuple(values["failed"]),
    )
