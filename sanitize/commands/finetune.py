"""`sanitize finetune`: clean shards + encoder → a head (linear, mlp), encoder and head (full), or a CLIP (contrastive).

index the samples → embed them once (linear, mlp) or stream them (full, contrastive) → train → measure → write the folder.
"""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sanitize import runtime, storage
from sanitize.artifacts import run_record
from sanitize.artifacts.encoder_folder import save_clip, save_encoder
from sanitize.artifacts.folder_lock import folder_lock
from sanitize.artifacts.head_folder import TrainedHead, load_head, save_head
from sanitize.config import EncoderSpec, FinetuneConfig
from sanitize.config_loading import from_mapping, to_mapping, with_absolute_paths
from sanitize.errors import RefusedError, check
from sanitize.pages.plain import Section, numbers_table, plain_page
from sanitize.progress import ProgressDisplay
from sanitize.records import Shard
from sanitize.runtime import Resources
from sanitize.stages.encoders import load_encoder, weights_sha256
from sanitize.stages.preprocessing import complete_spec
from sanitize.stages.shards import head_tails, list_shards
from sanitize.stages.text import load_text_encoder
from sanitize.training.clip import Clip, class_embeddings, load_clip
from sanitize.training.data import IndexedSource, Source, embed_sources, index_sources
from sanitize.training.distributed import Rank, ReportCallback, train_on_ray
from sanitize.training.embedding_cache import LabelledEmbeddings
from sanitize.training.evaluation import evaluate, zero_shot
from sanitize.training.heads import Head
from sanitize.training.loop import Objective, State, Trainer, load_finished
from sanitize.training.objectives import (
    Classifier,
    ContrastiveObjective,
    FullObjective,
    HeadObjective,
    Towers,
    require_lanes,
)
from sanitize.training.sample_index import DataSet, class_count

log = logging.getLogger(__name__)
INPUTS = ("shards", "validation", "triggered")  # settings that name shards
PLACEMENT = ("workers", "gpus_per_worker", "cpus_per_worker", "address", "out", "checkpoint_steps")  # not what it gives
TIMES = ("seconds", "samples_per_second")  # columns of metrics.jsonl that differ from run to run
REMEMBERED = ("mode", "epochs", "batch_size", "learning_rate", "weight_decay", "seed")  # settings in head.json


@dataclass(frozen=True)
class FinetuneResult:
    """samples: that were trained on. unreadable: whose image or caption turned out to be broken; unusable: the others left
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
    training: DataSet | LabelledEmbeddings
    validation: DataSet | LabelledEmbeddings | None
    threads: int


def finetune(config: FinetuneConfig) -> FinetuneResult:
    """Train on the shards, measure on the validation shards, write `config.out`. After a kill the same call goes on."""
    sets = {name: list_shards(getattr(config, name)) for name in INPUTS}
    config = dataclasses.replace(config, encoder=with_absolute_paths(complete_spec(config.encoder)))
    encoder = load_encoder(config.encoder)
    fingerprint = encoder.fingerprint()
    if config.mode == "contrastive":
        load_text_encoder(config.encoder)  # fail here, not in a worker
    with folder_lock(config.out, "finetune"):
        run = _identity(config, fingerprint, sets)
        _refuse_other_run(config.out, run)
        if storage.exists(storage.join(config.out, "finetune.json")):
            log.info("%s holds this training already", config.out)
            run_record.remove_scaffolding(config.out)
            return _result(config)
        resources = runtime.plan(
            config.workers, config.cpus_per_worker, config.gpus_per_worker, len(sets["shards"]), config.address
        )
        with runtime.session_for(resources, config.address):
            cache = storage.absolute(storage.join(config.out, "cache", storage.json_sha256(run)[:16]))
            sources = index_sources(config, _sources(config, sets), cache, resources)
            classes = _classes(config, sources)
            storage.write_json(
                storage.join(config.out, "run.json"), run
            )  # not before labels and classes are known to fit
            course = _course(config, fingerprint, sources, len(classes), cache, resources)
            model, state = _train(config, course, resources)
            spec = _write_trained(config, model, fingerprint, classes)
            evaluation = _evaluate(config, spec, classes, sources, course, cache, resources)
        return _finish(config, sources, classes, state, evaluation)


def _identity(config: FinetuneConfig, fingerprint: str, sets: dict[str, list[Shard]]) -> dict[str, Any]:
    """What makes this run this run: settings, inputs, encoder; not where and on how many workers it happens."""
    settings = {key: value for key, value in to_mapping(config).items() if key not in PLACEMENT}
    both_towers = weights_sha256(config.encoder) if config.mode == "contrastive" else ""
    inputs = {name: head_tails(shards) for name, shards in sets.items()}
    return settings | inputs | {"encoder": [fingerprint, both_towers]}


def _refuse_other_run(out: str, run: dict[str, Any]) -> None:
    """A folder never mixes two trainings; run.json remembers which it holds."""
    known = run_record.refuse_other_run(out, "run.json", run, "a training", inputs=INPUTS)
    if not known and storage.exists(storage.join(out, "training", "last.pt")):
        raise RefusedError(
            f"{out}: holds checkpoints of an unknown training (no run.json). Give another --out, or delete the folder."
        )


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


def _classes(config: FinetuneConfig, sources: dict[str, IndexedSource]) -> tuple[str, ...]:
    """Names in the order of the labels. Raises ConfigError when a label has none."""
    names = config.classes
    if config.mode != "contrastive":
        count = class_count(names, sources["shards"].data.labels, "classes")
        names = names or tuple(str(label) for label in range(count))
    for name in ("validation", "triggered"):
        if name in sources and names:
            class_count(names, sources[name].data.labels, name)
    check(
        config.target < max(len(names), 1) or not names,
        f"target: {config.target}, but there are {len(names)} classes (labels 0 to {len(names) - 1}). Correct --target.",
    )
    return names


def _course(
    config: FinetuneConfig,
    fingerprint: str,
    sources: dict[str, IndexedSource],
    classes: int,
    cache: str,
    resources: Resources,
) -> Course:
    training, validation = sources["shards"].data, sources.get("validation")
    if config.mode in ("full", "contrastive"):
        require_lanes(config, training, resources.workers)
        return Course(config, classes, training, validation.data if validation else None, resources.cpus)
    features = embed_sources(config, config.encoder, fingerprint, list(sources.values()), cache, resources)
    return Course(config, classes, features["shards"], features.get("validation"), resources.cpus)


def _objective(course: Course) -> Objective:
    config, training, validation = course.config, course.training, course.validation
    if isinstance(training, LabelledEmbeddings):
        assert validation is None or isinstance(validation, LabelledEmbeddings)
        return HeadObjective(config, course.classes, training, validation)
    assert not isinstance(validation, LabelledEmbeddings)
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
                _train_here(course, Rank(0, 1, runtime.device()), folder, show)
        else:

            def loop(shared: Course, rank: Rank, report: ReportCallback) -> None:
                _train_here(shared, rank, folder, report)

            train_on_ray(loop, course, resources, folder, show)
    model = _objective(course).model
    return model, load_finished(config, model, folder)


def _train_here(course: Course, rank: Rank, folder: str, report: ReportCallback) -> None:
    Trainer(course.config, _objective(course), rank, folder, report).run()


# ---------------------------------------------------------------- result


def _write_trained(config: FinetuneConfig, model: nn.Module, fingerprint: str, classes: tuple[str, ...]) -> EncoderSpec:
    """Write head and encoder, whichever was trained; returns the encoder that goes with them.

    fingerprint: of the encoder before training
    """
    model.eval().requires_grad_(False)
    if isinstance(model, Towers):
        text = load_text_encoder(config.encoder)
        text.tower.load_state_dict(model.text.state_dict())
        return save_clip(Clip(model.image, text, model.logit_scale), config.out)
    spec, head = config.encoder, model
    if isinstance(model, Classifier):
        spec, head = save_encoder(model.encoder, config.out), model.head
        fingerprint = load_encoder(spec).fingerprint()
    assert isinstance(head, Head)
    values = to_mapping(config)
    settings = {name: values[name] for name in REMEMBERED}
    save_head(TrainedHead(head, classes, fingerprint), config.out, settings)
    return spec


def _evaluate(
    config: FinetuneConfig,
    spec: EncoderSpec,
    classes: tuple[str, ...],
    sources: dict[str, IndexedSource],
    course: Course,
    cache: str,
    resources: Resources,
) -> dict[str, float]:
    """Nothing when there is nothing to measure on. spec: the encoder that goes with the head, or the fine-tuned CLIP."""
    if not classes or not {"validation", "triggered"} & set(sources):
        return {}
    encoder = load_encoder(spec)
    if config.mode == "contrastive":
        predict = zero_shot(class_embeddings(load_text_encoder(spec), classes, config.prompts))
    else:
        predict = load_head(config.out, encoder).predictions
    known = course.training if isinstance(course.training, LabelledEmbeddings) else None
    fingerprint = encoder.fingerprint()
    return evaluate(config, spec, fingerprint, predict, len(classes), sources, known, cache, resources)


def _finish(
    config: FinetuneConfig,
    sources: dict[str, IndexedSource],
    classes: tuple[str, ...],
    state: State,
    evaluation: dict[str, float],
) -> FinetuneResult:
    """Write finetune.json, the mark of a finished training, and delete what only served to get there."""
    training = sources["shards"]
    samples = int(state.metrics[-1]["samples"])
    values = {
        "mode": config.mode,
        "samples": samples,
        "unreadable": len(training.data) - samples,
        "unusable": dict(training.unusable),
        "classes": list(classes),
        "epochs": state.metrics,
        "evaluation": evaluation,
        "failed": sorted(message for source in sources.values() for message in source.failed),
        "versions": run_record.library_versions(),
    }
    storage.write_bytes(storage.join(config.out, "report.html"), _page(config, classes, state.metrics, evaluation))
    storage.write_json(storage.join(config.out, "finetune.json"), values)
    run_record.remove_scaffolding(config.out)
    return _result(config)


def _result(config: FinetuneConfig) -> FinetuneResult:
    path = storage.join(config.out, "finetune.json")
    values = {name: value for name, value in storage.read_json(path).items() if name != "versions"}
    return from_mapping(FinetuneResult, values | {"out": config.out}, path)


def _page(
    config: FinetuneConfig, classes: Sequence[str], epochs: Sequence[dict[str, float]], evaluation: dict[str, float]
) -> bytes:
    """Without times and places, so that the same training gives the same page."""
    cards = [("Mode", config.mode, f"seed {config.seed}"), ("Epochs", str(len(epochs)), f"of {config.epochs}")]
    cards += [("Samples", f"{int(epochs[-1]['samples']):,}", f"{len(classes)} classes")]
    cards += [(name.replace("_", " "), f"{value:.4g}", "") for name, value in evaluation.items()]
    record = [(name, str(getattr(config, name))) for name in REMEMBERED]
    sections = [numbers_table("Epochs", epochs, leave_out=TIMES), Section("Settings", record=record)]
    return plain_page("What was trained", config.encoder.architecture, cards, sections)
