"""Named settings of `sanitize fit`."""

from typing import Any

from sanitize.errors import check

# "default": low-resolution decoder. "paper": shapes, schedule and ratios of DeDe's reference code (tardisblue9/DeDe).
FIT_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "scorer": "paper",
        "test_mask_ratio": 0.99,
        "decoder": {
            "image_size": 32,
            "patch_size": 4,
            "width": 192,
            "heads": 3,
            "encoder_depth": 12,
            "decoder_depth": 4,
            "standardize_embedding": False,
        },
        "training": {
            "epochs": 200,
            "batch_size": 256,
            "learning_rate": 1e-3,
            "weight_decay": 1e-6,
            "mask_ratio_min": 0.9,
            "mask_ratio_max": 0.9,
            "schedule": "constant",
        },
    },
}


def preset(name: str) -> dict[str, Any]:
    check(name in FIT_PRESETS, f"preset {name!r} is not known. Use one of {', '.join(FIT_PRESETS)}.")
    return FIT_PRESETS[name]
