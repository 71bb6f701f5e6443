"""PatchSearch: parts against plain loops; a patch that moves images into its cluster is found, and a clean encoder shows none."""

import logging

import pytest
import torch
from builders import ColourEncoder, auroc, random_images
from torch.nn import functional

from sanitize.detectors import fit_detector, patch_classifier, patch_search
from sanitize.detectors.patch_search import Patch, Probes
from sanitize.detectors.reference_set import ReferenceSet
from sanitize.errors import ConfigError
from sanitize.stages.encoders import embed_in_batches

SIDE = 4  # of the trigger and of the windows; images have 16 pixels
MAGENTA = torch.tensor([255, 0, 255], dtype=torch.uint8)[:, None, None]


class PatchedEncoder(ColourEncoder):
    """SYNTHETIC backdoor: mean colours of blocks; a magenta square of 4 pixels, anywhere, sends an image far along one more axis."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        distance = (images - MAGENTA.float()[None] / 255).abs().amax(dim=1, keepdim=True)
        fired = (functional.max_pool2d(distance, SIDE, stride=1) == 0).float().amax(dim=(1, 2, 3))
        return torch.cat([functional.avg_pool2d(images - 0.5, 4).flatten(1), 10 * fired[:, None]], dim=1)


def stamped(images: torch.Tensor, row: int = 9, column: int = 3) -> torch.Tensor:
    images = images.clone()
    images[:, :, row : row + SIDE, column : column + SIDE] = MAGENTA
    return images


@pytest.fixture(scope="module")
def scan():
    """300 images, the last 12 with the trigger, each at a place of its own; and the truth."""
    images = random_images(300, first=3000)
    for number in range(288, 300):
        images[number] = stamped(images[number : number + 1], number % 11, number % 7)[0]
    return images, torch.arange(300) >= 288


def score(encoder, images, seed=0, **settings):
    nothing = ReferenceSet(images[:1], torch.zeros(1, 1))  # which the method does not look at
    values = {"clusters": 8, "window": SIDE, "test_images": 40, "steps": 60} | settings
    return fit_detector("patch_search", nothing, encoder, seed, values)(images, embed_in_batches(encoder, images))


# ---------------------------------------------------------------- planted, and clean


def test_the_search_finds_the_planted_patch_and_the_classifier_every_image_that_holds_it(scan, caplog):
    images, truth = scan
    with caplog.at_level(logging.INFO, "sanitize.detectors.patch_search"):  # an earlier test may have silenced sanitize
        assert auroc(score(PatchedEncoder(), images), truth) > 0.95
    assert "patches moves 3" in caplog.text  # of 40 test images, some of which are triggered
    tried = score(PatchedEncoder(), images, kind="search")
    assert truth[tried.argsort(descending=True)[:3]].all()
    assert tried.max() > 0.8 * 40


def test_an_encoder_without_a_backdoor_shows_no_poisonous_patch(scan):
    images, truth = scan
    encoder = ColourEncoder()  # has another trigger, which is not here
    tried = score(encoder, images, kind="search")
    assert tried.max() < 0.5 * 40
    assert 0.2 < auroc(tried, truth) < 0.8


def test_a_trigger_of_a_fixed_place_is_found_where_patches_go_where_they_came_from():
    class FixedPlace(ColourEncoder):
        """The trigger works at rows 9 to 12 and columns 3 to 6 only."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            fired = (images[:, :, 9:13, 3:7] == MAGENTA.float()[None] / 255).flatten(1).all(dim=1).float()
            return torch.cat([functional.avg_pool2d(images - 0.5, 4).flatten(1), 10 * fired[:, None]], dim=1)

    images = random_images(300, first=3000)
    images[288:] = stamped(images[288:])
    own, anywhere = (score(FixedPlace(), images, kind="search", window=7, place=place) for place in ("own", "random"))
    assert own.max() > 0.8 * 40
    assert anywhere.max() < 0.5 * 40


# ---------------------------------------------------------------- its parts


def test_paste_is_the_plain_loop():
    images, patch = random_images(3), torch.randint(0, 256, (3, 5, 5), dtype=torch.uint8)
    rows, columns = torch.tensor([0, 11, 4]), torch.tensor([11, 0, 7])
    expected = images.clone()
    for number, (row, column) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        for i in range(5):
            for j in range(5):
                expected[number, :, row + i, column + j] = patch[:, i, j]
    assert torch.equal(patch_search.paste(images, patch, rows, columns), expected)
    assert torch.equal(images, random_images(3))


def test_the_poison_score_counts_images_of_other_clusters_that_arrive():
    encoder, centres = PatchedEncoder(), torch.zeros(2, 49).double()
    centres[0, 0], centres[1, 48] = 0.1, 1  # cluster 1: where triggered images are
    clean = random_images(4)
    tests = Probes(clean, torch.tensor([0, 0, 0, 1]), torch.zeros(4).long(), torch.zeros(4).long(), own_place=False)
    trigger = Patch(MAGENTA.expand(3, SIDE, SIDE), 0, 0)
    assert patch_search.poison_score(trigger, 1, tests, centres, encoder) == 3  # the fourth was there before
    assert patch_search.poison_score(Patch(clean[0, :, :4, :4], 0, 0), 1, tests, centres, encoder) == 0


def test_heat_is_the_plain_loop_and_the_candidate_is_the_trigger():
    encoder, image = PatchedEncoder(), stamped(random_images(1))[0]
    centre = torch.cat([torch.zeros(48), torch.ones(1)]).double()

    def cosine(picture):
        return functional.cosine_similarity(embed_in_batches(encoder, picture[None]).double(), centre[None])[0]

    drops = {}
    for row in torch.linspace(0, 12, 6).round().int().tolist():
        for column in torch.linspace(0, 12, 6).round().int().tolist():
            covered = image.clone()
            covered[:, row : row + SIDE, column : column + SIDE] = image.float().mean(dim=(1, 2)).round()[:, None, None]
            drops[row, column] = cosine(image) - cosine(covered)
    heat = patch_search.heat_map(image, centre, encoder, SIDE)
    for y, x in ((0, 0), (8, 4), (10, 5), (15, 15)):
        over = [drop for (row, column), drop in drops.items() if row <= y < row + SIDE and column <= x < column + SIDE]
        assert float(heat[y, x]) == pytest.approx(float(sum(over) / len(over)), abs=1e-6)
    found = patch_search.candidate_patch(image, centre, encoder, 7)
    assert torch.equal(found.pixels, image[:, found.row : found.row + 7, found.column : found.column + 7])
    assert found.row <= 9 <= found.row + 3
    assert found.column <= 3 <= found.column + 3


def test_the_search_tries_two_images_of_every_cluster_and_drops_a_quarter_of_them_at_a_time(scan):
    images, _ = scan
    embeddings = embed_in_batches(PatchedEncoder(), images)
    found = patch_search.search(images, embeddings, PatchedEncoder(), 8, 40, SIDE, seed=0)
    sizes = [8, 6, 5, 4, 3, 2, 1]  # clusters left, iteration by iteration
    assert len(found.images) <= 2 * sum(sizes)
    assert len(set(found.images.tolist())) == len(found.images) > 16
    assert (found.scores.diff() <= 0).all()
    assert torch.equal(found.of_images(300)[found.images], found.scores)
    assert int((found.of_images(300) > 0).sum()) == int((found.scores > 0).sum())


def test_the_classifier_does_not_learn_the_most_poisonous_tenth_as_clean():
    poison_scores = torch.zeros(50).index_put((torch.tensor([3, 7, 20, 21, 40]),), torch.tensor([9.0, 5, 8, 7, 6]))
    assert set(range(50)) - set(patch_classifier.least_poisonous(poison_scores, 0).tolist()) == {3, 7, 20, 21, 40}
    some = patch_classifier.least_poisonous(torch.zeros(50), 0)
    assert some.tolist() != sorted(some.tolist())  # equal scores: not the first images of the scan


def test_the_same_seed_gives_the_same_scores_and_draws_nothing_from_outside(scan):
    images, _ = scan
    first = score(PatchedEncoder(), images, steps=3)
    state = torch.random.get_rng_state()
    with torch.no_grad():
        assert torch.equal(score(PatchedEncoder(), images, steps=3), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.dtype == torch.float32
    assert first.shape == (300,)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "both"}, "kind: 'both' is not classifier or search"),
        ({"place": "corner"}, "place: 'corner' is not random or own"),
        ({"clusters": 1}, "clusters: 1 is below 2; a patch moves images from one to another"),
        ({"steps": 0}, "test_images, top_patches and steps must be at least 1"),
        ({"window": 16}, "window: 16 pixels do not fit an image of 16"),
    ],
)
def test_wrong_settings_say_what_is_wrong(settings, words, scan):
    with pytest.raises(ConfigError, match=words):
        score(PatchedEncoder(), scan[0], **settings)
