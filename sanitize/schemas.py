"""JSON Schema (draft 2020-12) of every file of settings that we read and of every JSON that we write, made from their dataclasses.

`python -m sanitize.schemas docs/schemas` writes them; a test holds those in the repository equal to it.
"""

import collections.abc
import dataclasses
import inspect
import json
import sys
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sanitize import config
from sanitize.artifacts.detector_description import Description, FitSummary
from sanitize.artifacts.head_folder import HeadDescription
from sanitize.artifacts.reviews import Review
from sanitize.artifacts.scan_folder import Run, ShardMarker, Summary
from sanitize.artifacts.scan_profile import ScanProfile
from sanitize.artifacts.truth import PoisonTruth
from sanitize.commands import audit, card, export, finetune, fit, poison, review, scan, verify
from sanitize.commands import inspect as inspect_command
from sanitize.config import EncoderSpec, FinetuneConfig, FitConfig, ScanConfig
from sanitize.deciding import CleanResult
from sanitize.presets import FIT_PRESETS

Schema = dict[str, Any]
CHOICES = {  # fields of type str that take one of a few words
    "policy": config.POLICIES,
    "mode": config.MODES,
    "scorer": config.SCORERS,
    "precision": config.PRECISIONS,
    "resize": ("squash", "crop"),
    "schedule": ("cosine", "constant"),
}
NUMBER: Schema = {"type": "number"}
THRESHOLD: Schema = {"anyOf": [NUMBER, {"enum": ["inf", "-inf", "nan"]}, {"type": "null"}]}  # JSON has no infinity
SCALARS: dict[Any, Schema] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: NUMBER,
    Any: {},
}
TEXT, TEXTS = SCALARS[str], {"type": "array", "items": SCALARS[str]}
TEXT_BY_STEM: Schema = {"type": "object", "additionalProperties": TEXT}
NOTHING: Mapping[str, Schema] = types.MappingProxyType({})


class Definitions:
    """Schemas of dataclasses. settings: people write them, so other keys are mistakes; else we do, and a later version may add some."""

    def __init__(self, *, settings: bool) -> None:
        self.settings = settings
        self.known: dict[str, Schema] = {}

    def of(self, hint: Any) -> Schema:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            if hint.__name__ not in self.known:
                self.known[hint.__name__] = self.object(hint)
            return {"$ref": f"#/$defs/{hint.__name__}"}
        if isinstance(hint, types.UnionType):
            return {"anyOf": [{"type": "null"} if part is type(None) else self.of(part) for part in arguments]}
        if origin in (dict, collections.abc.Mapping):
            return {"type": "object", "additionalProperties": self.of(arguments[1])}
        if origin in (tuple, list, collections.abc.Sequence):
            return {"type": "array", "items": self.of(arguments[0])}
        if hint is str and self.settings:
            return {"type": ["string", "number"]}  # effort: 0.05
        return SCALARS[hint]

    def object(
        self,
        cls: type,
        other: Mapping[str, Schema] = NOTHING,
        *,
        leave_out: Collection[str] = (),
        partial: bool = False,
    ) -> Schema:
        """The fields of `cls` without those in `leave_out`; other: fields that are something else, or there as well.

        Required is what has no default, so what an earlier version left out is valid; nothing when `partial`.
        """
        hints = typing.get_type_hints(cls)
        fields = [f for f in dataclasses.fields(cls) if f.name not in (*leave_out, *other)]
        properties = {f.name: self._field(f.name, hints[f.name]) for f in fields}
        schema: Schema = {"type": "object", "properties": {**properties, **other}}
        required = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
        if self.settings:
            schema["additionalProperties"] = False
        else:
            required += other
        if required and not partial:
            schema["required"] = required
        said = inspect.getdoc(cls) or ""
        return schema if said.startswith(f"{cls.__name__}(") else schema | {"description": said}

    def _field(self, name: str, hint: Any) -> Schema:
        if name == "threshold" and not self.settings:
            return THRESHOLD
        return {"enum": list(CHOICES[name])} if hint is str and name in CHOICES else self.of(hint)

    def close(self, title: str, schema: Schema) -> Schema:
        head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title}
        return head | schema | ({"$defs": self.known} if self.known else {})


def _settings_file() -> Schema:
    """sanitize.yaml: sections of settings, of which options may supply any."""
    definitions = Definitions(settings=True)
    paths = {"anyOf": [TEXT, TEXTS]}
    encoder = {"anyOf": [TEXT, definitions.of(EncoderSpec)]}
    common: dict[str, Schema] = {"shards": paths, "encoder": encoder}
    sections = {
        "fit": definitions.object(FitConfig, common | {"preset": {"enum": list(FIT_PRESETS)}}, partial=True),
        "scan": definitions.object(ScanConfig, common, partial=True),
        "finetune": definitions.object(
            FinetuneConfig, common | {"validation": paths, "triggered": paths}, partial=True
        ),
    }
    properties = {name: section | {"type": ["object", "null"]} for name, section in sections.items()}
    schema: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return definitions.close("sanitize.yaml", schema)


def _encoder_file() -> Schema:
    definitions = Definitions(settings=True)
    return definitions.close("encoder.yaml", definitions.object(EncoderSpec))


def _written(
    title: str, cls: type, other: Mapping[str, Schema] = NOTHING, *, leave_out: Collection[str] = ()
) -> Schema:
    definitions = Definitions(settings=False)
    return definitions.close(title, definitions.object(cls, other, leave_out=leave_out))


def all_schemas() -> dict[str, Schema]:
    """By name; the title says of which file."""
    inputs = dict.fromkeys(finetune.INPUTS, TEXT_BY_STEM)
    out_and_fingerprint = {"out": TEXT, "fingerprint": TEXT}
    versions: Schema = {"type": "object", "additionalProperties": TEXT}
    wrote: Schema = {"type": "object", "properties": {"wrote": TEXTS}, "required": ["wrote"]}
    metrics_line: Schema = {"type": "object", "additionalProperties": NUMBER, "required": ["epoch", "loss"]}
    return {
        "settings": _settings_file(),
        "encoder": _encoder_file(),
        "detector": _written("detector/detector.json", Description),
        "fit": _written(
            "detector/fit.json",
            FitConfig,
            {"encoder_fingerprint": TEXT, "format_version": NUMBER, "decode_path": TEXT, "inputs": TEXT_BY_STEM},
            leave_out=fit.PLACEMENT,
        ),
        "scan_run": _written("scanned/run.json", Run),
        "shard_marker": _written("scanned/done/<stem>.json, and a line of scanned/markers.jsonl", ShardMarker),
        "scan_summary": _written("scanned/summary.json", Summary),
        "scan_profile": _written("scanned/profile.json", ScanProfile),
        "review": _written("scanned/reviews/<number>.json", Review),
        "audit_summary": _written("scanned/audit/summary.json", audit.AuditSummary),
        "export_run": _written("exported/export.json", export.ExportRun),
        "finetune_run": _written(
            "head/run.json", FinetuneConfig, inputs | {"encoder": TEXTS}, leave_out=finetune.PLACEMENT
        ),
        "head": _written("head/head.json", HeadDescription),
        "metrics_line": Definitions(settings=False).close("a line of head/metrics.jsonl", metrics_line),
        "finetune": _written("head/finetune.json", finetune.FinetuneResult, {"versions": versions}, leave_out=["out"]),
        "inspect": _written(
            "inspected/inspect.json, and stdout of `sanitize inspect --json`", inspect_command.InspectReport
        ),
        "poison": _written("poisoned/poison.json", PoisonTruth),
        "result_init": Definitions(settings=False).close("stdout of `sanitize init --json`", wrote),
        "result_fit": _written("stdout of `sanitize fit --json`", FitSummary, out_and_fingerprint),
        "result_scan": _written("stdout of `sanitize scan --json`", scan.ScanResult),
        "result_scan_dry_run": _written("stdout of `sanitize scan --dry-run --json`", scan.ScanPlan),
        "result_clean": _written("stdout of `sanitize clean --json`, with and without --dry-run", CleanResult),
        "result_review": _written("stdout of `sanitize review --json`", review.ReviewResult),
        "result_export": _written("stdout of `sanitize export --json`", export.ExportResult),
        "result_card": _written("stdout of `sanitize card --json`", card.CardResult),
        "result_audit": _written("stdout of `sanitize audit --json`", audit.AuditResult),
        "result_verify": _written("stdout of `sanitize verify --json`", verify.VerifyResult),
        "result_finetune": _written("stdout of `sanitize finetune --json`", finetune.FinetuneResult),
        "result_poison": _written("stdout of `sanitize poison --json`", poison.PoisonResult),
    }


def files() -> dict[str, str]:
    """Name → text of each file of docs/schemas."""
    return {
        f"{name}.schema.json": json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
        for name, schema in all_schemas().items()
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (folder / name).write_text(text)
