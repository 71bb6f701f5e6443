"""`sanitize scan`: pass 1 scores every sample (shard → Parquet), then pass 2 (`clean`) splits the shards.

Files of one shard are committed by `done/<stem>.json`, written last; a rerun does only what has no marker.
"""

import contextlib
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sanitize import checkpoint, runtime, storage
from sanitize.checkpoint import Detector
from sanitize.clean import CleanResult, clean
from sanitize.config import EncoderSpec, ScanConfig, check, to_mapping
from sanitize.errors import RefusedError, ShardError
from sanitize.progress import ProgressDisplay
from sanitize.records import Shard
from sanitize.runtime import Result, ShardFunction, Tick
from sanitize.stages.captions import split_member
from sanitize.stages.loader import picture_batches
from sanitize.stages.score_table import ScoreWriter, rows
from sanitize.stages.scoring import Scorer
from sanitize.stages.shards import ShardReader, head_tail_sha256, list_shards, open_shard
from sanitize.stages.text import load_text_encoder
from sanitize.stages.thresholds import cut_off

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
    flag_p: float

    def start(self, threads: int) -> ShardFunction:
        detector = checkpoint.load(self.detector)
        encoder = checkpoint.load_matching_encoder(detector, self.encoder)
        text = load_text_encoder(encoder.spec) if self.caption_member else None
        scorer = checkpoint.scorer(detector, encoder, self.precision, runtime.device(), effort=self.effort, text=text)
        calibration = detector.calibration(self.effort)
        metadata = {"detector": detector.fingerprint, "effort": self.effort}
        return lambda shard, tick: self._score_shard(shard, tick, scorer, calibration, metadata, threads)

    def _score_shard(
        self,
        shard: Shard,
        tick: Tick,
        scorer: Scorer,
        calibration: NDArray[np.float32],
        metadata: dict[str, str],
        threads: int,
    ) -> Result:
        marker = marker_path(self.out, shard.stem)
        if storage.exists(marker):
            return storage.read_json(marker)
        samples = flagged = unscored = 0
        name = f"scores/{shard.stem}.parquet"
        with (
            open_shard(shard) as file,
            storage.atomic_write(storage.join(self.out, name)) as target,
            ScoreWriter(target, {"shard": shard.stem} | metadata) as writer,
        ):
            reader = ShardReader(file, shard, image_member=self.image_member, caption_member=self.caption_member)
            for pictures in picture_batches(reader.samples(), self.batch_size, threads):
                scores = scorer([p for p in pictures if p.pixels is not None])
                table = rows(shard.stem, pictures, scores, calibration)
                writer.add(table)
                samples += len(table)
                unscored += table.column("score").null_count
                flagged += int(np.sum(table.column("p_value").to_numpy() <= self.flag_p))
                tick(samples, flagged, reader.bytes_read)
            _require_images(reader, shard, samples)
        result = {
            "shard": shard.stem,
            "input": {
                "bytes": shard.size,
                "sha256": reader.sha256,
                "damage": reader.damage,
                "loose_members": reader.loose,
            },
            "samples": samples,
            "unscored": unscored,
            "files": {name: {"bytes": target.size, "sha256": target.sha256()}},
        }
        storage.write_json(marker, result)
        return result


def _require_images(reader: ShardReader, shard: Shard, samples: int) -> None:
    if samples and not reader.images:
        raise ShardError(
            f"{shard.url}: none of its {samples} samples has an image (found: {', '.join(sorted(reader.extensions))}). "
            "Give shards of images, or name the image's extension with image_member."
        )


def scan(config: ScanConfig) -> ScanResult:
    """Score all shards, then split them by the policy unless `scores_only`."""
    shards = list_shards(config.shards)
    detector = checkpoint.load(config.detector)
    encoder = checkpoint.load_matching_encoder(detector, config.encoder)  # fail here, not in a worker
    caption_member = _caption_member(config, encoder.spec)
    if not config.scores_only and config.policy.policy == "calibrated":
        # are there enough calibration scores for this rate? find out before any work
        calibration = detector.calibration(config.effort)
        cut_off(calibration, calibration, config.policy)
    resources = runtime.plan(
        config.workers, config.cpus_per_worker, config.gpus_per_worker, len(shards), config.address
    )
    _open_run(config, caption_member, detector, shards)
    task = ScoreTask(
        detector=storage.absolute(config.detector),
        encoder=config.encoder,
        out=storage.absolute(config.out),
        batch_size=config.batch_size,
        precision=config.precision,
        image_member=config.image_member,
        caption_member=caption_member,
        effort=config.effort,
        flag_p=config.policy.fpr,
    )
    todo = [shard for shard in shards if not storage.exists(marker_path(config.out, shard.stem))]
    if len(todo) < len(shards):
        log.info("%d of %d shards were scored before", len(shards) - len(todo), len(shards))
    failed, cleaned = [], None
    with runtime.ray_session(config.address) if resources.workers else contextlib.nullcontext():
        with ProgressDisplay("scan", len(todo), sum(s.size for s in todo)) as display:
            for outcome in runtime.map_shards(task, todo, resources, display, config.address):
                failed += [outcome.error] if outcome.error else []
        paths = [marker_path(config.out, shard.stem) for shard in shards]
        markers = [storage.read_json(path) for path in paths if storage.exists(path)]
        if markers and not config.scores_only:
            cleaned = clean(config.out, config.policy, force=config.force, resources=resources, address=config.address)
    return ScanResult(
        out=config.out,
        samples=sum(marker["samples"] for marker in markers),
        unscored=sum(marker["unscored"] for marker in markers),
        failed=tuple(sorted(failed)),
        damaged=tuple(
            f"{marker['shard']}.tar: {marker['input']['damage']}" for marker in markers if marker["input"]["damage"]
        ),
        cleaned=cleaned,
    )


def _caption_member(config: ScanConfig, spec: EncoderSpec) -> str:
    """Where captions are, "" when they are not read. Loads the text tower once, so that a wrong file fails here."""
    split_member(config.caption_member)
    check(
        bool(spec.tokenizer) or not config.caption_member,
        f"caption_member: {config.caption_member}, but the encoder names no text tower to compare captions with. Add "
        "`tokenizer: <tokenizer.json>` to its YAML (architecture clip).",
    )
    if not spec.tokenizer:
        return ""
    load_text_encoder(spec)
    return config.caption_member or "txt"


def marker_path(out: str, stem: str) -> str:
    return storage.join(out, "done", f"{stem}.json")


def _open_run(config: ScanConfig, caption_member: str, detector: Detector, shards: list[Shard]) -> None:
    """Write run.json, or check that it describes this very run: a folder never mixes two."""
    with ThreadPoolExecutor(16) as pool:
        hashes = list(pool.map(head_tail_sha256, shards))
    run: dict[str, Any] = {
        "detector": storage.absolute(config.detector),
        "detector_fingerprint": detector.fingerprint,
        "encoder": to_mapping(config.encoder or detector.encoder),
        "image_member": config.image_member,
        "caption_member": caption_member,
        "effort": config.effort,
        "precision": config.precision,
        "batch_size": config.batch_size,
        "shards": {
            s.stem: {"url": s.url, "bytes": s.size, "head_tail_sha256": h} for s, h in zip(shards, hashes, strict=True)
        },
        "versions": checkpoint.library_versions(),
    }
    path = storage.join(config.out, "run.json")
    if storage.exists(path):
        before = storage.read_json(path)
        changed = sorted(key for key in run if run[key] != before.get(key))
        if changed:
            raise RefusedError(
                f"{config.out}: holds a scan that differs in {', '.join(changed)}. Give another --out, or delete the folder to "
                "scan again."
            )
    else:
        storage.write_json(path, run)
    storage.remove_partials(config.out)
