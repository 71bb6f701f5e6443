"""`sanitize scan`: pass 1 scores every sample (shard → Parquet), then pass 2 (`clean`) splits the shards.

Files of one shard are committed by `done/<stem>.json`, written last; a rerun does only what has no marker.
"""

import logging
from dataclasses import dataclass

import numpy as np

from sanitize import runtime, storage, workers
from sanitize.artifacts.detector_folder import Detector, load_detector, load_matching_encoder, make_scorer
from sanitize.artifacts.folder_lock import folder_lock
from sanitize.artifacts.run_record import library_versions
from sanitize.artifacts.scan_folder import InputShard, Run, ScanFolder, ShardInput, ShardMarker, WrittenFile
from sanitize.artifacts.scan_profile import ShardProfile, write_profile
from sanitize.commands.clean import decide_and_split
from sanitize.config import EncoderSpec, ScanConfig
from sanitize.config_loading import to_mapping
from sanitize.deciding import CleanResult
from sanitize.errors import ShardError, check
from sanitize.profile import Profile, StageSeconds
from sanitize.progress import ProgressDisplay
from sanitize.records import Shard
from sanitize.runtime import Resources
from sanitize.stages.captions import split_member
from sanitize.stages.precision import computed_in
from sanitize.stages.prefetch import image_batches
from sanitize.stages.score_table import Floats, ScoreWriter, rows
from sanitize.stages.scoring import Scorer
from sanitize.stages.shard_reader import ShardReader
from sanitize.stages.shards import head_tails, list_shards, open_shard, refuse_to_overwrite
from sanitize.stages.text import load_text_encoder
from sanitize.stages.thresholds import threshold_for
from sanitize.workers import ProgressCallback, ShardFunction

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScanResult:
    """`failed`: one message for each shard that could not be read. `damaged`: for each whose tail could not."""

    out: str
    samples: int
    unscored: int
    failed: tuple[str, ...]
    damaged: tuple[str, ...]
    cleaned: CleanResult | None


@dataclass(frozen=True)
class ScanPlan:
    """What a scan would do. bytes: of the shards; scored: shards that were scored before; threshold: where the policy knows it."""

    out: str
    shards: int
    bytes: int
    scored: int
    workers: int
    cpus_per_worker: int
    gpus_per_worker: float
    policy: str
    threshold: float | None

    @property
    def text(self) -> str:
        where = f"{self.workers} workers with" if self.workers else "this process with"
        cut = "" if self.threshold is None else f", threshold {self.threshold:.4g} before adapting to the scan"
        return (
            f"would scan {self.shards} shards ({self.bytes / 1e6:.1f} MB; {self.scored} scored before) into {self.out}\n"
            f"  {where} {self.cpus_per_worker} CPUs and {self.gpus_per_worker:g} GPUs; policy {self.policy}{cut}"
        )


@dataclass(frozen=True)
class _Prepared:
    """Checked settings: what would fail, fails before any work."""

    shards: list[Shard]
    detector: Detector
    caption_member: str
    effort: str
    threshold: float | None
    resources: Resources


def _prepare(config: ScanConfig) -> _Prepared:
    shards = list_shards(config.shards, leave_out=config.out)[: config.limit or None]
    refuse_to_overwrite(shards, ScanFolder(config.out).tars)
    detector = load_detector(config.detector)
    encoder = load_matching_encoder(detector, config.encoder)  # fail here, not in a worker
    threshold, effort = None, config.effort or detector.default_effort
    if not config.scores_only and config.policy.policy == "calibrated":
        # are there enough calibration scores for this rate?
        calibration = detector.calibration(effort)
        threshold = threshold_for(calibration, calibration, config.policy)
    resources = runtime.plan(
        config.workers, config.cpus_per_worker, config.gpus_per_worker, len(shards), config.address
    )
    return _Prepared(shards, detector, _caption_member(config, encoder.spec), effort, threshold, resources)


def plan_scan(config: ScanConfig) -> ScanPlan:
    """What `scan` would do, after the checks it makes before it begins; nothing is written."""
    prepared = _prepare(config)
    shards, resources = prepared.shards, prepared.resources
    return ScanPlan(
        out=config.out,
        shards=len(shards),
        bytes=sum(shard.size for shard in shards),
        scored=len(ScanFolder(config.out).scored() & {shard.stem for shard in shards}),
        workers=resources.workers,
        cpus_per_worker=resources.cpus,
        gpus_per_worker=resources.gpus,
        policy=config.policy.policy,
        threshold=prepared.threshold,
    )


def scan(config: ScanConfig) -> ScanResult:
    """Score all shards, then split them by the policy unless `scores_only`."""
    folder, prepared = ScanFolder(config.out), _prepare(config)
    resources = prepared.resources
    with folder_lock(config.out, "scan"), runtime.session_for(resources, config.address):
        folder.claim(_run(config, prepared), config.append)
        failed = _score(config, prepared, folder)
        markers, cleaned = folder.markers(sorted(folder.run().shards)), None
        if markers and not config.scores_only:
            policy, force, address = config.policy, config.force, config.address
            (cleaned,) = decide_and_split([config.out], policy, force=force, resources=resources, address=address)
    return ScanResult(
        out=config.out,
        samples=sum(marker.samples for marker in markers),
        unscored=sum(marker.unscored for marker in markers),
        failed=tuple(sorted(failed)),
        damaged=tuple(f"{marker.shard}.tar: {marker.input.damage}" for marker in markers if marker.input.damage),
        cleaned=cleaned,
    )


def _caption_member(config: ScanConfig, spec: EncoderSpec) -> str:
    """Where captions are, "" when they are not read. Loads the text tower once, so that a wrong file fails here."""
    split_member(config.caption_member)
    check(
        bool(spec.tokenizer) or not config.caption_member,
        f"caption_member: {config.caption_member}, but the encoder names no text tower to compare captions with. Add "
        "`tokenizer: <tokenizer.json>` to its YAML (architecture clip or hf:<folder>).",
    )
    if not spec.tokenizer:
        return ""
    load_text_encoder(spec)
    return config.caption_member or "txt"


def _run(config: ScanConfig, prepared: _Prepared) -> Run:
    shards, detector = prepared.shards, prepared.detector
    hashes = head_tails(shards)
    inputs = {shard.stem: InputShard(shard.url, shard.size, hashes[shard.stem]) for shard in shards}
    return Run(
        detector=storage.absolute(config.detector),
        detector_fingerprint=detector.fingerprint,
        encoder=to_mapping(config.encoder or detector.encoder),
        image_member=config.image_member,
        caption_member=prepared.caption_member,
        effort=prepared.effort,
        precision=config.precision,
        shards=inputs,
        versions=library_versions(),
        computed_in=computed_in(config.precision, runtime.device()),
    )


# ---------------------------------------------------------------- scoring


def _score(config: ScanConfig, prepared: _Prepared, folder: ScanFolder) -> list[str]:
    """Pass 1 of the shards that have none yet; returns what failed."""
    shards = prepared.shards
    task = ScoreTask(
        detector=storage.absolute(config.detector),
        encoder=config.encoder,
        out=storage.absolute(config.out),
        batch_size=config.batch_size,
        precision=config.precision,
        image_member=config.image_member,
        caption_member=prepared.caption_member,
        effort=prepared.effort,
        flag_p=config.policy.fpr,
        profile=config.profile,
    )
    scored = folder.scored()
    todo = [shard for shard in shards if shard.stem not in scored]
    if todo:
        folder.delete_summary()  # of a pass 2 without them
    if len(todo) < len(shards):
        log.info("%d of %d shards were scored before", len(shards) - len(todo), len(shards))
    with ProgressDisplay("scan", len(todo), sum(s.size for s in todo)) as display:
        outcomes = list(workers.map_shards(task, todo, prepared.resources, display, config.address))
    write_profile(folder.path, {outcome.shard.stem: outcome.result for outcome in outcomes if outcome.result})
    return [outcome.error for outcome in outcomes if outcome.error]


@dataclass(frozen=True)
class ScoreTask:
    """Score one shard and commit its Parquet file."""

    detector: str
    encoder: EncoderSpec | None
    out: str
    batch_size: int
    precision: str
    image_member: str
    caption_member: str
    effort: str
    flag_p: float  # p-value up to which the progress display counts a sample as flagged
    profile: bool = False

    def start(self, threads: int) -> ShardFunction[ShardProfile]:
        detector = load_detector(self.detector)
        encoder = load_matching_encoder(detector, self.encoder)
        text = load_text_encoder(encoder.spec) if self.caption_member else None
        device = runtime.device()
        profile = Profile.on(device, apart=self.profile)
        scorer = make_scorer(detector, encoder, self.precision, device, effort=self.effort, text=text, profile=profile)
        calibration = detector.calibration(self.effort)
        metadata = {"detector": detector.fingerprint, "effort": self.effort}
        return lambda shard, progress: self._score_shard(shard, progress, scorer, calibration, metadata, threads)

    def _score_shard(
        self,
        shard: Shard,
        progress: ProgressCallback,
        scorer: Scorer,
        calibration: Floats,
        metadata: dict[str, str],
        threads: int,
    ) -> ShardProfile:
        folder, profile = ScanFolder(self.out), scorer.profile
        if marker := folder.marker(shard.stem):
            return ShardProfile(marker.samples, StageSeconds())
        profile.restart()
        samples = flagged = unscored = 0
        with profile.of("write"):  # and what else this thread does that is no stage of its own
            with profile.of("waiting_for_read"):
                opened = open_shard(shard)
            with (
                opened as file,
                storage.atomic_write(folder.scores(shard.stem)) as target,
                ScoreWriter(target, {"shard": shard.stem} | metadata) as writer,
            ):
                reader = ShardReader(file, shard, image_member=self.image_member, caption_member=self.caption_member)
                for decoded in image_batches(reader.samples(), self.batch_size, threads, scorer.encoder.spec, profile):
                    columns = scorer([image for image in decoded if image.pixels is not None])
                    table = rows(shard.stem, decoded, columns, calibration)
                    writer.add(table)
                    samples += len(table)
                    unscored += table.column("score").null_count
                    flagged += int(np.sum(table.column("p_value").to_numpy() <= self.flag_p))
                    progress(samples, flagged, reader.stored_bytes(decoded[-1].end), profile.seconds)
                _require_images(reader, shard, samples)
            written = WrittenFile(target.size, target.sha256())
            marker = ShardMarker(
                shard=shard.stem,
                input=ShardInput(reader.size, reader.sha256, reader.damage, reader.loose),
                samples=samples,
                unscored=unscored,
                files={folder.scores_name(shard.stem): written},
            )
            folder.write_marker(marker)
        progress(samples, flagged, shard.size, profile.seconds)
        return ShardProfile(samples, profile.seconds)


def _require_images(reader: ShardReader, shard: Shard, samples: int) -> None:
    if samples and not reader.images:
        raise ShardError(
            f"{shard.url}: none of its {samples} samples has an image (found: {', '.join(sorted(reader.extensions))}). "
            "Give shards of images, or name the image's extension with image_member."
        )
