"""Find and remove backdoor samples from image training data before fine-tuning.

The commands are functions with typed settings and results: `sanitize.scan(sanitize.ScanConfig(...))`. Each name is
imported on first use, so that `import sanitize` loads neither torch nor Ray.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers see; a test holds it, `__all__` and `_HOMES` equal
    from sanitize.attacks.triggers import make_trigger
    from sanitize.audit import AuditResult, audit
    from sanitize.checkpoint import Detector
    from sanitize.clean import CleanResult, clean
    from sanitize.config import EncoderSpec, FinetuneConfig, FitConfig, ScanConfig, ThresholdPolicy, load_encoder_spec
    from sanitize.dataset import KeptSamples, keep_only
    from sanitize.detectors.decree import DecreeConfig
    from sanitize.errors import SanitizeError
    from sanitize.finetune import FinetuneResult, finetune
    from sanitize.fit import fit
    from sanitize.inspect import Inspection, inspect
    from sanitize.poison import PoisonResult, poison
    from sanitize.scan import ScanResult, scan
    from sanitize.stages.heads import TrainedHead, load_head
    from sanitize.verify import VerifyResult, verify

__all__ = [
    "AuditResult",
    "CleanResult",
    "DecreeConfig",
    "Detector",
    "EncoderSpec",
    "FinetuneConfig",
    "FinetuneResult",
    "FitConfig",
    "Inspection",
    "KeptSamples",
    "PoisonResult",
    "SanitizeError",
    "ScanConfig",
    "ScanResult",
    "ThresholdPolicy",
    "TrainedHead",
    "VerifyResult",
    "audit",
    "clean",
    "finetune",
    "fit",
    "inspect",
    "keep_only",
    "load_encoder_spec",
    "load_head",
    "make_trigger",
    "poison",
    "scan",
    "verify",
]

__version__ = "0.1.0"

_HOMES = {  # module → the names of the library that live there; a command is a function with its module's name
    "fit": ("fit",),
    "finetune": ("finetune", "FinetuneResult"),
    "stages.heads": ("TrainedHead", "load_head"),
    "scan": ("scan", "ScanResult"),
    "clean": ("clean", "CleanResult"),
    "audit": ("audit", "AuditResult"),
    "verify": ("verify", "VerifyResult"),
    "inspect": ("inspect", "Inspection"),
    "poison": ("poison", "PoisonResult"),
    "dataset": ("KeptSamples", "keep_only"),
    "config": ("EncoderSpec", "FinetuneConfig", "FitConfig", "ScanConfig", "ThresholdPolicy", "load_encoder_spec"),
    "checkpoint": ("Detector",),
    "detectors.decree": ("DecreeConfig",),
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


class _Package(types.ModuleType):
    """Importing the module `sanitize.scan` must not put it in the place of the function `sanitize.scan`."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOME or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
