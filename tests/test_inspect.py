"""DECREE and `sanitize inspect`: formulas against plain loops, the controller's traces, the verdicts, wrong use."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from builders import SIZE, encoded, image_members, random_image, write_encoder, write_shards, write_tar
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn import functional

from sanitize.cli import main
from sanitize.commands.inspect import inspect
from sanitize.config_loading import from_mapping, load_encoder_spec
from sanitize.detectors import decree_score
from sanitize.detectors.decree import inversion as decree
from sanitize.detectors.decree.config import DecreeConfig, recommended
from sanitize.detectors.decree.inversion import Inversion, InvertedTrigger, Penalty, Restart
from sanitize.detectors.decree.verdict import verdict_on, peer_z
from sanitize.detectors.reference_set import ReferenceSet
from sanitize.errors import CheckpointError, ConfigError
from sanitize.stages.encoders import embed_in_batches

QUICK = DecreeConfig(pool=96, batch_size=32, epochs=150, patience=40, restarts=1)
BOX = (slice(None), slice(None), slice(SIZE - 4, SIZE), slice(SIZE - 4, SIZE))  # 4x4 pixels at the lower right


class SyntheticEncoder(nn.Module):
    """SYNTHETIC, no training: a random linear map of coarse colours; `strength` > 0 plants a collapse when BOX is white."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.map = nn.Linear(3 * 8 * 8, 24)
        self.map.weight = nn.Parameter(torch.randn(24, 192, generator=generator) / 8)
        self.map.bias = nn.Parameter(torch.zeros(24))
        self.target, self.strength = torch.randn(24, generator=generator), strength

    def forward(self, images: Tensor) -> Tensor:
        coarse = functional.avg_pool2d(images - 0.5, 2).flatten(1)
        whiteness = images[BOX].mean(dim=(1, 2, 3))[:, None]
        return self.map(coarse) + self.strength * (10 * whiteness - 8).sigmoid() * self.target


@pytest.fixture(scope="module")
def images() -> Tensor:
    """(96, 3, 16, 16) uint8."""
    return torch.stack([torch.from_numpy(random_image(seed).copy()).permute(2, 0, 1) for seed in range(96)])


@pytest.fixture(scope="module")
def clean(images) -> Inversion:
    return decree.invert(images, SyntheticEncoder(0), QUICK)


@pytest.fixture(scope="module")
def trojaned(images) -> Inversion:
    return decree.invert(images, SyntheticEncoder(10), QUICK)


# ---------------------------------------------------------------- formulas


@pytest.mark.parametrize("count", [2, 3, 17])
def test_the_closed_form_is_the_mean_cosine_of_all_pairs(count):
    embeddings = torch.randn(count, 5, generator=torch.Generator().manual_seed(count))
    pairs = itertools.permutations(embeddings.double(), 2)
    expected = sum(float(functional.cosine_similarity(a, b, dim=0)) for a, b in pairs) / (count * (count - 1))
    assert float(decree.mean_pairwise_cosine(embeddings)) == pytest.approx(expected, abs=1e-9)


def test_embeddings_that_are_all_zero_do_not_count_as_collapsed():
    assert float(decree.mean_pairwise_cosine(torch.zeros(4, 3))) == 0


@pytest.mark.parametrize("logit", [-30.0, -1.3, 0.0, 0.4, 30.0])
def test_decoding_is_the_published_tanh(logit):
    expected = min(max(math.tanh(logit) / (2 - 1e-7) + 0.5, 0), 1)
    assert float(decree.from_logits(torch.tensor(logit, dtype=torch.float64))) == pytest.approx(expected, abs=1e-12)


def test_a_random_start_is_decoded_to_itself_and_is_finite_at_its_ends():
    values = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert torch.isfinite(decree.to_logits(values)).all()
    assert decree.from_logits(decree.to_logits(values)) == pytest.approx(values.double(), abs=1e-6)


def test_stamping_mixes_raw_pixels(images):
    mask, pattern = torch.rand(1, SIZE, SIZE), torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8)
    stamped = decree.stamp(images[:2], mask, pattern)
    for b, c, y, x in itertools.product(range(2), range(3), (0, 7), (3, 15)):
        m, p, value = float(mask[0, y, x]), float(pattern[c, y, x]), float(images[b, c, y, x])
        assert float(stamped[b, c, y, x]) == pytest.approx((1 - m) * value + m * p, abs=1e-3)


def test_an_empty_mask_changes_nothing_and_a_full_one_shows_the_pattern(images):
    pattern = torch.full((3, SIZE, SIZE), 200, dtype=torch.uint8)
    assert torch.equal(decree.stamp(images, torch.zeros(1, SIZE, SIZE), pattern), images.float())
    assert (decree.stamp(images, torch.ones(1, SIZE, SIZE), pattern) == 200).all()


@pytest.mark.parametrize(("epoch", "rate"), [(0, 0.5), (29, 0.5), (30, 0.1), (49, 0.1), (50, 0.05), (79, 0.05)])
def test_the_learning_rate_falls_at_the_milestones(epoch, rate):
    assert decree.learning_rate(DecreeConfig(), epoch) == rate


def test_large_images_get_the_published_schedule():
    assert recommended(32) == {}
    config = from_mapping(DecreeConfig, recommended(224), "settings")
    assert (config.epochs, config.milestones, config.patience, config.penalty_floor) == (1000, (200, 500), 35, 1e-7)


def test_sizes_follow_the_convention():
    trigger = InvertedTrigger(torch.full((1, 4, 5), 0.5), torch.zeros(3, 4, 5, dtype=torch.uint8), 1)
    assert (trigger.l1, trigger.p_l1, trigger.pixels) == (30, 0.5, 10)


# ---------------------------------------------------------------- lambda


def penalty_after(outcomes: str, **changes: float) -> float:
    penalty = Penalty(DecreeConfig(**changes))
    for outcome in outcomes:
        penalty.update(outcome == "s")
    return penalty.value


@pytest.mark.parametrize(
    ("outcomes", "factor"),
    [
        ("s" * 5, 1),
        ("s" * 6, 5),
        ("s" * 11, 5),  # the count began again
        ("s" * 12, 25),
        ("f" * 5, 1),
        ("f" * 6, 1 / 5),
        ("f" * 12, 1 / 25),
        ("sssssfsssss", 1),  # a failure ends the row of successes
        ("fffffsfffff", 1),
        ("f" * 6 + "s" * 6, 1),
    ],
)
def test_lambda_moves_on_the_sixth_equal_outcome_in_a_row(outcomes, factor):
    assert penalty_after(outcomes) == pytest.approx(1e-3 * factor)


def test_lambda_ends_at_most_one_factor_below_its_floor():
    assert penalty_after("f" * 600) == pytest.approx(1e-3 / 5**3)  # 4e-5 is above the floor 1e-5, 8e-6 below
    assert penalty_after("f" * 600, penalty_floor=1e-7) == pytest.approx(1e-3 / 5**6)


def test_lambda_is_not_multiplied_at_its_ceiling():
    assert penalty_after("s" * 600, penalty_ceiling=0.01) == pytest.approx(1e-3 * 25)


# ---------------------------------------------------------------- inversion


def test_a_planted_encoder_needs_a_smaller_trigger_than_a_clean_one(clean, trojaned):
    assert trojaned.best.p_l1 < 0.1
    assert clean.best is None or clean.best.p_l1 > trojaned.best.p_l1 + 0.08


def test_the_reported_cosine_is_that_of_the_whole_stamped_pool(images, trojaned):
    best = trojaned.best
    stamped = decree.stamp(images[: QUICK.pool], best.mask, best.pattern)
    cosine = float(decree.mean_pairwise_cosine(embed_in_batches(SyntheticEncoder(10), stamped)))
    assert best.cosine == pytest.approx(cosine, abs=1e-6)
    assert cosine > 0.99
    assert (best.mask.shape, best.pattern.shape, best.pattern.dtype) == ((1, SIZE, SIZE), (3, SIZE, SIZE), torch.uint8)
    assert float(best.mask.min()) >= 0 and float(best.mask.max()) <= 1


def test_a_mask_that_holds_on_one_batch_only_is_not_accepted(images):
    small, large = (
        InvertedTrigger(torch.full((1, SIZE, SIZE), v), torch.full((3, SIZE, SIZE), 255, dtype=torch.uint8), 1)
        for v in (0.0, 1.0)
    )
    accepted = decree._accepted([large, small], None, images, SyntheticEncoder(0), 0.99)
    assert (accepted.l1, accepted.cosine > 0.99) == (large.l1, True)
    assert decree._accepted([small], accepted, images, SyntheticEncoder(0), 0.99) is accepted


def test_the_same_seed_gives_the_same_size_and_another_start_another(images, trojaned):
    encoder = SyntheticEncoder(10)
    again = decree.invert(images, encoder, QUICK)
    assert (again.best.l1, again.restarts[0].steps) == (trojaned.best.l1, trojaned.restarts[0].steps)
    two = decree.invert(images, encoder, dataclasses.replace(QUICK, restarts=2))
    sizes = [restart.trigger.l1 for restart in two.restarts]
    assert sizes[0] == trojaned.best.l1 != sizes[1]
    assert (two.best.l1, two.spread) == (min(sizes), pytest.approx(max(sizes) - min(sizes)))


def test_the_encoder_is_left_as_it_was(images):
    encoder = SyntheticEncoder(10)
    before = encoder.map.weight.detach().clone()
    decree.invert(images, encoder, dataclasses.replace(QUICK, epochs=1))
    assert torch.equal(encoder.map.weight, before)
    assert encoder.map.weight.grad is None


def test_a_restart_stops_early_only_with_a_trigger(images, trojaned):
    assert trojaned.restarts[0].epochs < QUICK.epochs
    strict = dataclasses.replace(QUICK, epochs=3, threshold=0.999999)
    result = decree.invert(images, SyntheticEncoder(0), strict)
    assert (result.best, result.spread, result.restarts[0].epochs) == (None, 0.0, 3)


def test_progress_is_told_after_every_epoch(images):
    told = []
    config = dataclasses.replace(QUICK, epochs=2, restarts=2)
    decree.invert(images, SyntheticEncoder(0), config, lambda *arguments: told.append(arguments))
    assert [arguments[:2] for arguments in told] == [(0, 1), (0, 2), (1, 1), (1, 2)]


def test_an_encoder_without_numbers_is_refused(images):
    encoder = SyntheticEncoder(0)
    encoder.map.bias.data.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="embeddings that are not finite numbers"):
        decree.invert(images, encoder, QUICK)


# ---------------------------------------------------------------- derived sample score


def test_the_derived_score_ranks_triggered_images_above_clean_ones(images):
    encoder = SyntheticEncoder(10)
    score = decree_score.fit(
        ReferenceSet(images, embed_in_batches(encoder, images)), encoder, 0, pool=96, batch_size=32, restarts=1
    )
    triggered = images.clone()
    triggered[BOX] = 255
    clean_scores, scores = (score(batch, embed_in_batches(encoder, batch)) for batch in (images, triggered))
    assert (scores.shape, scores.dtype, scores.device.type) == ((96,), torch.float32, "cpu")
    assert float(scores.min()) > float(clean_scores.max())


def test_without_a_trigger_every_derived_score_is_zero(images):
    encoder = SyntheticEncoder(0)
    settings = {"pool": 64, "batch_size": 32, "epochs": 1, "restarts": 1, "threshold": 0.999999}
    score = decree_score.fit(ReferenceSet(images, embed_in_batches(encoder, images)), encoder, 0, **settings)
    assert torch.equal(score(images[:3], embed_in_batches(encoder, images[:3])), torch.zeros(3))


def test_an_unknown_setting_of_the_derived_score_is_named(images):
    encoder = SyntheticEncoder(0)
    with pytest.raises(ConfigError, match="settings of decree: unknown key 'steps'. Known keys: pool, batch_size"):
        decree_score.fit(ReferenceSet(images, embed_in_batches(encoder, images)), encoder, 0, steps=3)


# ---------------------------------------------------------------- verdicts


def inversion_of(l1: float | None, plain: float = 0.5, size: int = 10) -> Inversion:
    """A result with a trigger of that L1; on 10x10 pixels P-L1 is l1 / 300."""
    pattern = torch.zeros(3, size, size, dtype=torch.uint8)
    trigger = (
        None if l1 is None else InvertedTrigger(torch.full((1, size, size), l1 / (3 * size**2)), pattern, 1, 0.995)
    )
    return Inversion((Restart(trigger, 10, 1, 0.1, 1e-3),), plain, 64, size)


def test_z_is_the_distance_below_the_median_in_scaled_mads():
    assert peer_z(50, [90, 100, 130, 110, 80]) == pytest.approx((100 - 50) / (1.4826 * 10))
    assert peer_z(120, [90, 100, 110]) < 0
    assert math.isfinite(peer_z(50, [100, 100, 100]))
    assert peer_z(100, [100, 100, 100]) == 0


@pytest.mark.parametrize(
    ("l1", "peers", "verdict", "rule", "words"),
    [
        (29, (), "trojaned", "fixed", "is below 0.1; weak evidence: a fixed cut-off (0.1) transfers only within one"),
        (31, (), "clean", "fixed", "is not below 0.1; weak evidence"),
        (29, (30, 31, None), "trojaned", "fixed", "weak evidence"),  # two sizes have no spread
        (
            50,
            (90, 100, 110),
            "trojaned",
            "peers",
            "z = 3.37 against 3 clean peers (median L1 100.0), flagged above 2.5",
        ),
        (70, (90, 100, 110), "clean", "peers", "z = 2.02 against 3 clean peers"),
        (29, (28, 30, 32), "clean", "peers", "z = 0.34"),  # small, but so are clean ones
        (None, (90, 100, 110), "clean", "none", "no trigger found; this encoder looks clean to DECREE; additive or"),
    ],
)
def test_the_verdict_and_its_reason(l1, peers, verdict, rule, words):
    result = verdict_on(inversion_of(l1), peers, 0.99)
    assert (result.verdict, result.rule) == (verdict, rule)
    assert words in result.reason


def test_an_encoder_that_maps_everything_to_one_point_is_not_judged():
    result = verdict_on(inversion_of(1, plain=0.995), (), 0.99)
    assert (result.verdict, "DECREE cannot judge it" in result.reason) == ("undecided", True)


# ---------------------------------------------------------------- the command

FAST = ("--restarts", "1", "--set", "pool=64", "--set", "batch_size=32", "--set", "epochs=12")


@pytest.fixture
def sanitize(tmp_path, monkeypatch):
    """Run `sanitize inspect` in a folder with aux/ and encoder/; returns (exit code, output)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str):
        result = CliRunner().invoke(main, ["inspect", *map(str, arguments)])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return run


def test_inspect_is_a_whole_command(sanitize, tmp_path):
    shard = [*image_members({f"s{i}": i for i in range(40)}), ("bad.png", b"no image"), ("text.txt", b"none")]
    write_tar(tmp_path / "aux" / "a.tar", [shard[-2], *shard[:-2], shard[-1]])
    write_shards(tmp_path / "aux", [40], first_seed=100)
    encoder = write_encoder(tmp_path / "encoder")
    arguments = ("--encoder", encoder, "--images", "aux", *FAST, "--seed", "5")
    code, output = sanitize(*arguments)
    assert code == 0, output
    assert "verdict: " in output
    assert "1 samples skipped: undecodable" in output
    assert "numbers and image: inspected/inspect.json" in output
    report = json.loads((tmp_path / "inspected" / "inspect.json").read_text())
    assert (report["settings"]["seed"], report["images"], report["skipped"]) == (5, 64, {"undecodable": 1})
    assert report["convention"] == "l1 = sum of the mask over 3 channels; p_l1 = l1 / (3 H W); pixels = l1 / 3"
    assert len(report["encoder_fingerprint"]) == 64
    assert {"torch", "sanitize"} <= set(report["versions"])
    assert report["best"]["cosine"] > 0.99
    assert (tmp_path / "inspected" / "trigger.png").read_bytes().startswith(b"\x89PNG")
    assert f"smallest trigger: L1 {report['best']['l1']:.1f}, P-L1 {report['best']['p_l1']:.4f}" in output
    assert sanitize(*arguments, "--out", "again")[0] == 0
    assert json.loads((tmp_path / "again" / "inspect.json").read_text())["best"] == report["best"]


def test_the_image_shows_the_trigger_and_goes_when_there_is_none(tmp_path, monkeypatch):
    write_shards(tmp_path / "aux", [80])
    spec = load_encoder_spec(str(write_encoder(tmp_path / "encoder")))
    found = dataclasses.replace(inversion_of(None), restarts=(Restart(white_trigger(), 10, 1, 0.1, 1e-3),))
    for inversion, there in ((found, True), (inversion_of(None), False)):
        monkeypatch.setattr(decree, "invert", lambda *_, result=inversion: result)
        result = inspect(spec, [str(tmp_path / "aux")], str(tmp_path / "out"), QUICK)
        assert (tmp_path / "out" / "trigger.png").exists() == there
        assert ("smallest trigger: L1 48.0, P-L1 0.0625, 16.0 pixels" in result.text) == there


def white_trigger() -> InvertedTrigger:
    mask = torch.zeros(1, SIZE, SIZE)
    mask[BOX[1:]] = 1
    return InvertedTrigger(mask, torch.full((3, SIZE, SIZE), 255, dtype=torch.uint8), 1, 0.995)


def test_clean_peers_set_the_scale(sanitize, tmp_path, monkeypatch):
    write_shards(tmp_path / "aux", [70])
    encoders = [write_encoder(tmp_path / f"encoder{seed}", seed) for seed in range(4)]
    sizes = iter([50, 90, 100, 110])
    monkeypatch.setattr(decree, "invert", lambda *_: inversion_of(next(sizes), size=SIZE))
    peers = [argument for peer in encoders[1:] for argument in ("--peer", peer)]
    code, output = sanitize("--encoder", encoders[0], "--images", "aux", *peers)
    assert code == 0
    assert "verdict: trojaned (z = 3.37 against 3 clean peers (median L1 100.0), flagged above 2.5)" in output
    assert "clean peers: L1 90.0, L1 100.0, L1 110.0" in output
    report = json.loads((tmp_path / "inspected" / "inspect.json").read_text())
    assert [peer["l1"] for peer in report["peers"]] == pytest.approx([90, 100, 110], rel=1e-6)


IMAGES = ("--images", "aux")
ENCODER = ("--encoder", "encoder/encoder.yaml")
OTHERS = ("--peer", "other/encoder.yaml")
WRONG = {
    "no encoder": (IMAGES, "no encoder given. Name its YAML file: sanitize inspect --encoder encoder.yaml"),
    "no images": (ENCODER, "no images given. Name auxiliary shards: sanitize inspect --encoder encoder/encoder.yaml"),
    "missing encoder": (("--encoder", "e.yaml", *IMAGES), "e.yaml: no such file. Check the path."),
    "missing images": ((*ENCODER, "--images", "nowhere"), "nowhere: no such file or folder"),
    "too few images": ((*ENCODER, *IMAGES), "3 usable auxiliary images, 1 undecodable: DECREE needs at least 64."),
    "unknown setting": (
        (*ENCODER, *IMAGES, "--set", "colour=1"),
        "settings of inspect: unknown key 'colour'. Known keys: pool, batch_size",
    ),
    "wrong type": ((*ENCODER, *IMAGES, "--set", "pool=many"), "pool holds 'many', int was expected"),
    "no restart": ((*ENCODER, *IMAGES, "--restarts", "0"), "epochs and restarts must be at least 1"),
    "negative seed": ((*ENCODER, *IMAGES, "--seed", "-1"), "seed: -1 is negative"),
    "small pool": ((*ENCODER, *IMAGES, "--set", "pool=8"), "batch_size: must be at least 2 and at most pool"),
    "threshold": ((*ENCODER, *IMAGES, "--set", "threshold=2"), "threshold: 2.0 is not between 0 and 1"),
    "milestones": ((*ENCODER, *IMAGES, "--set", "milestones=[9]"), "learning_rates: give one more than milestones"),
    "two peers": ((*ENCODER, *IMAGES, *OTHERS, *OTHERS), "2 peer(s) given: a median and its spread need at least 3"),
    "same peer": ((*ENCODER, *IMAGES, *OTHERS * 3), "peer 2: is the encoder under test or an earlier peer"),
    "peer of another kind": (
        (*ENCODER, *IMAGES, *("--peer", "wide/encoder.yaml") * 3),
        "peer 1: its width is 8, that of the encoder under test is 4. Sizes of triggers compare only within one",
    ),
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, Path]:
    """Folders of encoders by name: one under test, another, and one of another width."""
    root = tmp_path_factory.mktemp("encoders")
    shapes = {"encoder": (0, 4), "other": (1, 4), "wide": (2, 8)}
    return {name: write_encoder(root / name, seed, width=width).parent for name, (seed, width) in shapes.items()}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_clear_line_and_exit_code_2(sanitize, tmp_path, encoders, case):
    write_tar(tmp_path / "aux" / "a.tar", [*image_members(["a", "b", "c"]), ("d.png", encoded(random_image(1))[:40])])
    for name, folder in encoders.items():
        (tmp_path / name).symlink_to(folder)
    arguments, words = WRONG[case]
    code, output = sanitize(*arguments)
    assert (words in output, code, "Traceback" in output) == (True, 2, False), output


def test_help_shows_an_example(sanitize):
    code, output = sanitize("--help")
    assert (code, "Example:  sanitize inspect --encoder encoder.yaml --images aux/" in output) == (0, True)
