"""Find and remove backdoor samples from image training data before fine-tuning.

The commands are functions with typed settings and results: `sanitize.scan(sanitize.ScanConfig(...))`. Each name is
imported on first use, so that `import sanitize` loads neither torch nor Ray.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers see; a test holds it, `__all__` and `_HOMES` equal
    from sanitize.artifacts.detector_folder import Detector
    from sanitize.artifacts.encoder_folder import export_encoder
    from sanitize.artifacts.head_folder import TrainedHead, load_head
    from sanitize.attacks.triggers import make_trigger
    from sanitize.commands.audit import AuditResult, audit
    from sanitize.commands.card import CardResult, card
    from sanitize.commands.check_encoder import EncoderCheck, check_encoder
    from sanitize.commands.clean import clean
    from sanitize.commands.export import ExportResult, export
    from sanitize.commands.finetune import FinetuneResult, finetune
    from sanitize.commands.fit import fit
    from sanitize.commands.inspect import Inspection, inspect
    from sanitize.commands.list_samples import ListResult, list_samples
    from sanitize.commands.pack import PackResult, pack
    from sanitize.commands.poison import PoisonResult, poison
    from sanitize.commands.review import ReviewResult, review
    from sanitize.commands.scan import ScanResult, scan
    from sanitize.commands.verify import VerifyResult, verify
    from sanitize.config import EncoderSpec, FinetuneConfig, FitConfig, ScanConfig, ThresholdPolicy
    from sanitize.config_loading import load_encoder_spec
    from sanitize.deciding import CleanResult
    from sanitize.detectors.decree.config import DecreeConfig
    from sanitize.errors import SanitizeError
    from sanitize.kept_samples import KeptSamples, keep_only

__all__ = [
    "AuditResult",
    "CardResult",
    "CleanResult",
    "DecreeConfig",
    "Detector",
    "EncoderCheck",
    "EncoderSpec",
    "ExportResult",
    "FinetuneConfig",
    "FinetuneResult",
    "FitConfig",
    "Inspection",
    "KeptSamples",
    "ListResult",
    "PackResult",
    "PoisonResult",
    "ReviewResult",
    "SanitizeError",
    "ScanConfig",
    "ScanResult",
    "ThresholdPolicy",
    "TrainedHead",
    "VerifyResult",
    "audit",
    "card",
    "check_encoder",
    "clean",
    "export",
    "export_encoder",
    "finetune",
    "fit",
    "inspect",
    "keep_only",
    "list_samples",
    "load_encoder_spec",
    "load_head",
    "make_trigger",
    "pack",
    "poison",
    "review",
    "scan",
    "verify",
]

__version__ = "0.1.0"

_HOMES = {  # module → the names of the library that live there
    "commands.fit": ("fit",),
    "commands.finetune": ("finetune", "FinetuneResult"),
    "commands.scan": ("scan", "ScanResult"),
    "commands.clean": ("clean",),
    "deciding": ("CleanResult",),
    "commands.audit": ("audit", "AuditResult"),
    "commands.verify": ("verify", "VerifyResult"),
    "commands.check_encoder": ("check_encoder", "EncoderCheck"),
    "commands.inspect": ("inspect", "Inspection"),
    "commands.export": ("export", "ExportResult"),
    "commands.list_samples": ("list_samples", "ListResult"),
    "commands.pack": ("pack", "PackResult"),
    "commands.poison": ("poison", "PoisonResult"),
    "commands.card": ("card", "CardResult"),
    "commands.review": ("review", "ReviewResult"),
    "kept_samples": ("KeptSamples", "keep_only"),
    "config": ("EncoderSpec", "FinetuneConfig", "FitConfig", "ScanConfig", "ThresholdPolicy"),
    "config_loading": ("load_encoder_spec",),
    "artifacts.detector_folder": ("Detector",),
    "artifacts.encoder_folder": ("export_encoder",),
    "artifacts.head_folder": ("TrainedHead", "load_head"),
    "detectors.decree.config": ("DecreeConfig",),
    "attacks.triggers": ("make_trigger",),
    "errors": ("SanitizeError",),
}
_HOME = {name: f"sanitize.{module}" for module, names in _HOMES.items() for name in names}


if not TYPE_CHECKING:  # a type checker that saw it would take every misspelt name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'sanitize' has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
