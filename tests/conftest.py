"""Fixtures shared by all tests. Everything runs on the CPU in fp32 with one torch thread."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

from builders import fit_config, write_encoder, write_shards

from sanitize.commands.fit import fit
from sanitize.config import ScanConfig
from sanitize.config_loading import load_encoder_spec

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
        values = {
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


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray for all tests that need it; it imports test modules by their path."""
    import ray

    ray.init(
        address="local",  # never one that somebody else runs on this machine
        include_dashboard=False,
        num_cpus=2,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}},
    )
    yield
    ray.shutdown()
