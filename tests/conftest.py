"""Fixtures shared by all tests. Everything runs on the CPU in fp32 with one torch thread."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy: its threads and torch's would wait for each other
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch
from click.testing import CliRunner

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

from builders import (
    REMOVE_SOME,
    ColourEncoder,
    captioned,
    fit_config,
    labelled,
    random_images,
    with_white_corner,
    write_encoder,
    write_shards,
)

from sanitize.artifacts.encoder_folder import save_clip
from sanitize.attacks import tiny_clip
from sanitize.cli import main
from sanitize.commands.fit import fit
from sanitize.commands.scan import scan
from sanitize.config import EncoderSpec, FinetuneConfig, ScanConfig
from sanitize.config_loading import load_encoder_spec
from sanitize.detectors.reference_set import ReferenceSet
from sanitize.stages.encoders import embed_in_batches

pytest_plugins = ["faults.s3_fixtures"]
SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.exists():
        pytest.skip("../shared/data is not here; this test needs its real files")
    return SHARED


@pytest.fixture(scope="session")
def encoder_yaml(tmp_path_factory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def encoder_spec(encoder_yaml):
    return load_encoder_spec(str(encoder_yaml))


@pytest.fixture(scope="session")
def aux_shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("aux"), [140, 100], first_seed=10_000)


@pytest.fixture(scope="session")
def detector(tmp_path_factory, aux_shards, encoder_spec) -> Path:
    """A fitted detector folder."""
    out = tmp_path_factory.mktemp("detector") / "detector"
    fit(fit_config(aux_shards, encoder_spec, out))
    return out


@pytest.fixture
def shards(tmp_path) -> Path:
    return write_shards(tmp_path / "shards", [20, 1, 33])


@pytest.fixture
def scan_config(detector, tmp_path):
    """Settings of a scan in this process; keywords override."""

    def make(shards: Path, out: str = "scanned", **changes) -> ScanConfig:
        values: dict[str, Any] = {
            "shards": (str(shards),),
            "detector": str(detector),
            "out": str(tmp_path / out),
            "precision": "fp32",
            "batch_size": 8,
            "workers": 0,
            "force": True,
        }
        return ScanConfig(**(values | changes))

    return make


@pytest.fixture
def scanned(shards, scan_config, tmp_path) -> str:
    """The folder of a scan of 54 samples in 3 shards, 16 of them removed."""
    scan(scan_config(shards, policy=REMOVE_SOME))
    return str(tmp_path / "scanned")


@pytest.fixture(scope="session")
def scanned_once(tmp_path_factory, detector) -> Path:
    """The same scan, which nobody writes to."""
    folder = tmp_path_factory.mktemp("once")
    settings: dict[str, Any] = {"precision": "fp32", "batch_size": 8, "workers": 0, "policy": REMOVE_SOME}
    shards = str(write_shards(folder / "shards", [20, 1, 33]))
    scan(ScanConfig(shards=(shards,), detector=str(detector), out=str(folder / "scanned"), **settings))
    return folder


@pytest.fixture
def scanned_copy(scanned_once, tmp_path) -> str:
    """A scan folder as `scanned`, its shards elsewhere, without the time of scanning."""
    return str(shutil.copytree(scanned_once / "scanned", tmp_path / "scanned"))


# ---------------------------------------------------------------- finetune


@pytest.fixture(scope="session")
def labelled_shards(tmp_path_factory) -> Path:
    return labelled(tmp_path_factory.mktemp("labelled"), [70, 3, 1, 22])


@pytest.fixture(scope="session")
def validation(tmp_path_factory) -> Path:
    return labelled(tmp_path_factory.mktemp("validation"), [20, 10], first_seed=5000)


@pytest.fixture(scope="session")
def tiny_clip_spec(tmp_path_factory) -> EncoderSpec:
    folder = tmp_path_factory.mktemp("clip")
    words = str(folder / "words.json")
    spec = EncoderSpec("clip", "", 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), width=8, tokenizer=words)
    save_clip(tiny_clip.build(spec, tiny_clip.write_tokenizer(words), seed=0), str(folder))
    return load_encoder_spec(str(folder / "encoder.yaml"))


@pytest.fixture(scope="session")
def captioned_shards(tmp_path_factory) -> Path:
    return captioned(tmp_path_factory.mktemp("captioned"), [50, 1, 13])


@pytest.fixture
def finetune_config(labelled_shards, encoder_spec, tmp_path):
    """Settings of a small training in this process; keywords override."""

    def make(out: str = "head", **changes) -> FinetuneConfig:
        values: dict[str, Any] = {
            "shards": (str(labelled_shards),),
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

    return make


# ---------------------------------------------------------------- detectors


@pytest.fixture(scope="session")
def colour_encoder() -> ColourEncoder:
    return ColourEncoder()


@pytest.fixture(scope="session")
def clean_set(colour_encoder) -> ReferenceSet:
    images = random_images(200)
    return ReferenceSet(images, embed_in_batches(colour_encoder, images))


@pytest.fixture(scope="session")
def stream(colour_encoder):
    """60 images of which the last 6 are triggered: images, embeddings, truth."""
    images = random_images(60, first=1000)
    images[54:] = with_white_corner(images[54:])
    return images, embed_in_batches(colour_encoder, images), torch.arange(60) >= 54


# ---------------------------------------------------------------- Ray


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray for all tests that need it; it imports test modules by their path."""
    import ray

    ray.init(
        address="local",  # never one that somebody else runs on this machine
        include_dashboard=False,
        num_cpus=2,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}},
    )
    yield
    ray.shutdown()


@pytest.fixture
def sanitize(tmp_path, monkeypatch):
    """Run a command in an empty folder; returns (exit code, output)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str):
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return run
