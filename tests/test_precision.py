"""One decision for the number format: bf16 only where it is multiplied natively, and nobody else asks for it."""

import json
import re
from pathlib import Path

import pytest
import torch
from builders import SPEC, random_images

from sanitize.attacks import simclr
from sanitize.attacks.simclr import SimclrConfig
from sanitize.commands.scan import scan
from sanitize.stages import precision
from sanitize.stages.precision import resolve_precision

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
WITH_BF16, WITHOUT_BF16 = {"avx512_bf16": True, "avx512_f": True}, {"avx512_f": True}


@pytest.mark.parametrize(
    ("processor", "limit", "expected"),
    [
        (WITH_BF16, "", torch.bfloat16),
        (WITH_BF16, "AVX512_CORE_BF16", torch.bfloat16),
        (WITH_BF16, "AVX512_CORE_AMX", torch.bfloat16),
        (WITH_BF16, "AVX512_CORE", torch.float32),
        (WITH_BF16, "AVX2", torch.float32),
        (WITH_BF16, "avx2_vnni_2", torch.float32),
        (WITHOUT_BF16, "", torch.float32),
        (WITHOUT_BF16, "AVX512_CORE_BF16", torch.float32),
        ({"neon": True, "bf16": True}, "", torch.float32),
    ],
)
def test_auto_is_bf16_where_the_processor_multiplies_it_and_onednn_may(monkeypatch, processor, limit, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert resolve_precision("auto", CPU) == expected


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux says in /proc/cpuinfo what the processor can do")
def test_auto_agrees_with_what_linux_says_of_this_processor(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    native = "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    assert resolve_precision("auto", CPU) == (torch.bfloat16 if native else torch.float32)


@pytest.mark.parametrize("limit", ["", "AVX2"])
def test_what_is_asked_for_is_taken(monkeypatch, limit):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert resolve_precision("bf16", CPU) == torch.bfloat16
    assert resolve_precision("fp32", CPU) == torch.float32


def test_without_native_bf16_an_attack_trains_in_fp32(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    formats = set()
    forward = simclr.Encoder.forward

    def watched(self, images):
        embeddings = forward(self, images)
        formats.add(embeddings.dtype)
        return embeddings

    monkeypatch.setattr(simclr.Encoder, "forward", watched)
    simclr.pretrain(random_images(8), SPEC, SimclrConfig(epochs=1, batch_size=4), 0, CPU)
    assert formats == {torch.float32}


def test_only_one_module_asks_for_bf16():
    asks = re.compile(r"torch\.bfloat16|torch\.autocast\(|\.bfloat16\(")
    modules = [path for folder in ("sanitize", "pipelines", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    found = [str(path.relative_to(ROOT)) for path in modules if asks.search(path.read_text())]
    assert found == ["sanitize/stages/precision.py"]


# ---------------------------------------------------------------- what is remembered


def test_run_json_says_what_auto_became_and_another_machine_may_go_on(shards, scan_config, tmp_path, monkeypatch):
    config = scan_config(shards, precision="auto")
    path = tmp_path / "scanned" / "run.json"
    here = {"native": True}
    monkeypatch.setattr(precision, "_cpu_multiplies_bf16", lambda: here["native"])
    scan(config)
    before = path.read_bytes()
    assert json.loads(before)["computed_in"] == "bf16 on cpu"
    here["native"] = False
    assert scan(config).failed == ()
    assert path.read_bytes() == before, "it remembers where the scan began"


def test_a_run_json_from_before_it_was_recorded_stays_valid(shards, scan_config, tmp_path):
    config = scan_config(shards)
    scan(config)
    path = tmp_path / "scanned" / "run.json"
    values = json.loads(path.read_text())
    assert values.pop("computed_in") == "fp32 on cpu"
    path.write_text(json.dumps(values))
    assert scan(config).failed == ()
