import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from builders import SIZE, SPEC, encoded, image_members, random_picture, write_shards, write_tar
from PIL import Image

from sanitize.attacks import badencoder, simclr
from sanitize.attacks.augment import colour_jitter, flip_and_jitter, gray, random_resized_crop
from sanitize.attacks.badencoder import BadEncoderConfig, attack, losses, unit
from sanitize.attacks.evaluation import Features, weighted_knn
from sanitize.attacks.triggers import PatchTrigger
from sanitize.config import ScanConfig
from sanitize.errors import ConfigError
from sanitize.metrics import attack_success, detection
from sanitize.poison import load_truth, poison
from sanitize.stages.encoders import Encoder, build_backbone


def pictures(count: int, first: int = 0) -> torch.Tensor:
    return torch.stack([torch.from_numpy(random_picture(first + i).copy()).permute(2, 0, 1) for i in range(count)])


# ---------------------------------------------------------------- poison


def test_poison_changes_the_chosen_images_only_and_keeps_the_truth(tmp_path):
    write_shards(tmp_path / "in", [12, 8])
    result = poison((str(tmp_path / "in"),), str(tmp_path / "out"), rate=0.25, trigger=PatchTrigger(side=4), seed=3)
    truth = load_truth(str(tmp_path / "out" / "poison.json"))
    assert result.poisoned == len(truth) == 5
    import tarfile

    for name in ("part-0000", "part-0001"):
        with (
            tarfile.open(tmp_path / "in" / f"{name}.tar") as before,
            tarfile.open(tmp_path / "out" / f"{name}.tar") as after,
        ):
            assert before.getnames() == after.getnames()
            for position, member in enumerate(before.getnames()):
                old, new = before.extractfile(member).read(), after.extractfile(member).read()
                stamped = (name, position // 2) in truth and member.endswith("png")
                assert (old != new) == stamped
                if stamped:
                    a, b = (np.asarray(Image.open(__import__("io").BytesIO(x))) for x in (old, new))
                    assert (b[11:15, 11:15] == 255).all()
                    b = b.copy()
                    b[11:15, 11:15] = a[11:15, 11:15]
                    assert np.array_equal(a, b)


def test_poison_is_reproducible_from_its_seed(tmp_path):
    write_shards(tmp_path / "in", [12])
    for name in ("a", "b"):
        poison((str(tmp_path / "in"),), str(tmp_path / name), rate=0.25, trigger=PatchTrigger(side=4), seed=3)
    assert (tmp_path / "a" / "part-0000.tar").read_bytes() == (tmp_path / "b" / "part-0000.tar").read_bytes()
    assert json.loads((tmp_path / "a" / "poison.json").read_text()) == json.loads(
        (tmp_path / "b" / "poison.json").read_text()
    )


def test_lossy_images_are_all_encoded_again_so_that_the_codec_tells_nothing(tmp_path):
    members = [(f"k{i}.jpg", encoded(random_picture(i), "JPEG", quality=50, subsampling=2)) for i in range(6)]
    write_tar(tmp_path / "in" / "s.tar", members)
    poison((str(tmp_path / "in"),), str(tmp_path / "out"), rate=0.5, trigger=PatchTrigger(side=4))
    import tarfile

    with tarfile.open(tmp_path / "out" / "s.tar") as tar:
        tables = {str(Image.open(tar.extractfile(name)).quantization) for name in tar.getnames()}
    assert len(tables) == 1


def test_poisoning_into_a_used_folder_is_refused(tmp_path):
    write_shards(tmp_path / "in", [4])
    poison((str(tmp_path / "in"),), str(tmp_path / "out"), rate=0.5, trigger=PatchTrigger(side=4))
    with pytest.raises(ConfigError, match="holds poisoned shards already"):
        poison((str(tmp_path / "in"),), str(tmp_path / "out"), rate=0.5, trigger=PatchTrigger(side=4))


# ---------------------------------------------------------------- augmentation


def test_views_stay_images_and_come_from_the_seed():
    images = pictures(6).float() / 255
    for view in (random_resized_crop, colour_jitter, flip_and_jitter):
        first, second = (view(images, torch.Generator().manual_seed(7)) for _ in range(2))
        assert torch.equal(first, second)
        assert first.shape == images.shape
        assert 0 <= first.min() <= first.max() <= 1
        assert not torch.equal(first, images)


def test_gray_pictures_stay_gray_under_jitter():
    images = gray(pictures(8).float() / 255).expand(-1, 3, -1, -1)
    jittered = colour_jitter(images, torch.Generator().manual_seed(0))
    torch.testing.assert_close(jittered[:, 0], jittered[:, 2], atol=2e-3, rtol=0)


# ---------------------------------------------------------------- losses against plain loops


def test_nt_xent_is_the_plain_loop():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 4, 5, generator=generator)
    views = torch.nn.functional.normalize(torch.cat([first, second]), dim=1)
    terms = []
    for i in range(8):
        others = [float(views[i] @ views[j]) / 0.5 for j in range(8) if j != i]
        partner = float(views[i] @ views[(i + 4) % 8]) / 0.5
        terms.append(float(torch.logsumexp(torch.tensor(others), 0)) - partner)
    assert float(simclr.nt_xent(first, second, 0.5)) == pytest.approx(np.mean(terms), rel=1e-5)


def test_badencoder_losses_are_the_plain_loops_of_the_card():
    generator = torch.Generator().manual_seed(0)
    clean, triggered, targets = (unit(torch.randn(3, 5, generator=generator)) for _ in range(3))
    reference, reference_target = (unit(torch.randn(1, 5, generator=generator)) for _ in range(2))
    augmented = unit(torch.randn(2, 5, generator=generator))
    terms = losses(clean, triggered, reference, augmented, targets, reference_target)
    assert float(terms.effectiveness) == pytest.approx(-np.mean([float(t @ reference[0]) for t in triggered]), rel=1e-5)
    assert float(terms.reference) == pytest.approx(
        -np.mean([float(a @ reference_target[0]) for a in augmented]), rel=1e-5
    )
    assert float(terms.utility) == pytest.approx(
        -np.mean([float(c @ t) for c, t in zip(clean, targets, strict=True)]), rel=1e-5
    )


@pytest.fixture(scope="module")
def clean_encoder():
    torch.manual_seed(0)
    return Encoder(build_backbone(SPEC).eval(), SPEC)


def test_the_attack_moves_triggered_embeddings_and_freezes_batch_norm(clean_encoder):
    shadow = pictures(64)
    config = BadEncoderConfig(epochs=6, batch_size=32, reference_copies=4)
    trigger = PatchTrigger(side=5)
    device = torch.device("cpu")
    before = {name: tensor.clone() for name, tensor in clean_encoder.state_dict().items()}
    encoder = attack(clean_encoder, shadow, pictures(1, 900)[0], trigger, config, seed=0, device=device)
    after = encoder.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in clean_encoder.state_dict().items())
    assert all(torch.equal(before[name], after[name]) for name in before if "bn" in name or "downsample.1" in name)
    assert not torch.equal(before["backbone.conv1.weight"], after["backbone.conv1.weight"])
    reference = badencoder.embed(encoder, pictures(1, 900), device)
    test = pictures(40, 500)
    reached = [(badencoder.embed(e, trigger(test), device) @ reference.T).mean() for e in (clean_encoder, encoder)]
    assert reached[1] > reached[0]


def test_simclr_lowers_its_loss_and_is_seeded(caplog):
    import logging

    caplog.set_level(logging.INFO)
    config = simclr.SimclrConfig(epochs=3, batch_size=32, projection=8)
    first = simclr.pretrain(pictures(64), SPEC, config, 0, torch.device("cpu"))
    losses_seen = [float(record.args[2]) for record in caplog.records if "simclr" in record.msg]
    assert losses_seen[-1] < losses_seen[0]
    second = simclr.pretrain(pictures(64), SPEC, config, 0, torch.device("cpu"))
    assert first.fingerprint() == second.fingerprint()


# ---------------------------------------------------------------- metrics


def test_knn_votes_by_similarity():
    bank = Features(torch.eye(4), torch.tensor([0, 0, 1, 1]))
    assert weighted_knn(bank, Features(torch.eye(4), torch.tensor([0, 0, 1, 1])), 2, k=1) == 1.0


def test_attack_success_leaves_the_target_class_out():
    predictions, labels = np.array([9, 9, 1, 9]), np.array([9, 1, 1, 2])
    assert attack_success(predictions, labels, 9) == pytest.approx(2 / 3)


def test_detection_metrics_on_a_known_ranking():
    scores = np.r_[np.arange(100), [99.5, 200.0]].astype(np.float32)
    poisoned = np.r_[np.zeros(100, bool), [True, True]]
    quality = detection(scores, poisoned)
    assert (quality.auroc, quality.tpr_at_1pct, quality.fpr_at_95tpr) == (1.0, 1.0, 0.0)
    worse = detection(-scores, poisoned)
    assert (worse.auroc, worse.tpr_at_5pct) == (0.0, 0.0)


def test_a_planted_backdoor_is_found_by_the_whole_flow(detector, tmp_path):
    """Synthetic: white squares on smooth pictures are far from what this decoder can draw, even for a random encoder."""
    from sanitize.scan import scan

    write_shards(tmp_path / "in", [60], first_seed=500)
    poison(
        (str(tmp_path / "in"),),
        str(tmp_path / "out"),
        rate=0.1,
        trigger=PatchTrigger(side=SIZE - 4, colour=(255, 0, 255)),
    )
    scan(
        ScanConfig(
            shards=(str(tmp_path / "out"),),
            detector=str(detector),
            out=str(tmp_path / "s"),
            scores_only=True,
            workers=0,
        )
    )
    table = pq.read_table(tmp_path / "s" / "scores" / "part-0000.parquet")
    truth = load_truth(str(tmp_path / "out" / "poison.json"))
    poisoned = np.array([("part-0000", i) in truth for i in table.column("index").to_pylist()])
    assert detection(table.column("score").to_numpy(), poisoned).auroc > 0.8


def test_labelled_images_need_a_class_member(tmp_path):
    from pipelines.red_team import load_images

    write_tar(tmp_path / "in" / "s.tar", [m for m in image_members(["a"]) if m[0].endswith("png")])
    with pytest.raises(ConfigError, match=r"a has no .cls member"):
        load_images((str(tmp_path / "in"),), 0, SIZE)
