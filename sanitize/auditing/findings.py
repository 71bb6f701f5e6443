"""Campaigns of a scan: who is in each, what they have in common, and where their trigger is."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sanitize.auditing.pictures import Onlooker, Pictures
from sanitize.auditing.scored import SampleRow
from sanitize.errors import ShardError
from sanitize.stages import campaigns
from sanitize.stages.occlusion import common_part, occlusion_map
from sanitize.stages.score_table import Floats

log = logging.getLogger(__name__)
Counted = list[tuple[str, int]]
MOST_CAMPAIGNS = 24  # that are described; smaller ones are grouped all the same
EXPLAINED, EXAMPLES = 8, 3  # largest campaigns, and samples of each, that an occlusion map is made of


@dataclass(frozen=True)
class Occluded:
    """image: (3, S, S) in [0, 1]; places: (C, C), share of the way from the campaign's centre to where kept images lie."""

    image: Tensor
    places: Tensor


@dataclass(frozen=True)
class Campaign:
    """members: positions among the flagged pictures, highest score first; within: share of kept samples as close to its centre as
    half of it; mean and deviation (3, s, s), common (s, s): of its images, in [0, 1]; nearest: positions among the kept pictures;
    words: of captions, with their share here and among kept ones; usual_labels: share of each label among kept ones; occluded: of its
    highest scores."""

    members: list[int]
    within: float
    shards: Counted
    labels: Counted
    usual_labels: dict[str, float]
    captions: Counted
    words: list[tuple[str, float, float]]
    reasons: Counted
    mean: Tensor
    deviation: Tensor
    common: Tensor
    nearest: list[int]
    occluded: list[Occluded]

    def __len__(self) -> int:
        return len(self.members)


def find_campaigns(
    flagged: Pictures, kept: Pictures, rows: dict[int, SampleRow], onlooker: Onlooker
) -> tuple[campaigns.Groups, list[Campaign]]:
    """Group of each flagged picture, and the largest groups described. rows: of the scan, by their number."""
    groups = campaigns.group_by_embedding(flagged.embeddings, kept.embeddings)
    found = []
    for number in range(min(int(groups.max(initial=-1)) + 1, MOST_CAMPAIGNS)):
        members = [int(member) for member in np.flatnonzero(groups == number)]
        members.sort(key=lambda member: -(rows[int(flagged.rows[member])].score or 0.0))
        found.append(_describe(members, flagged, kept, rows, onlooker if number < EXPLAINED else None))
    return groups, found


def _describe(
    members: list[int], flagged: Pictures, kept: Pictures, rows: dict[int, SampleRow], onlooker: Onlooker | None
) -> Campaign:
    embeddings = flagged.embeddings[members]
    place = campaigns.centre(embeddings)
    own = [rows[int(flagged.rows[member])] for member in members]
    pictures = [flagged.pictures[member] for member in members]
    common, mean = common_part(flagged.pixels[members], kept.pixels)
    captions = [picture.caption for picture in pictures]
    examples = _occluded(own[:EXAMPLES], place, kept, onlooker) if onlooker else []
    return Campaign(
        members=members,
        within=campaigns.share_within(kept.embeddings, embeddings, place),
        shards=_counted([row.shard for row in own]),
        labels=_counted([picture.label for picture in pictures]),
        usual_labels={label: count / len(kept.pictures) for label, count in _counted([p.label for p in kept.pictures])},
        captions=[entry for entry in _counted(captions) if entry[1] > 1],
        words=campaigns.common_words(
            [text for text in captions if text], [p.caption for p in kept.pictures if p.caption]
        ),
        reasons=_counted([row.reason for row in own]),
        mean=mean,
        deviation=(flagged.pixels[members].float() / 255).std(dim=0, unbiased=False),
        common=common,
        nearest=campaigns.nearest(kept.embeddings, place),
        occluded=examples,
    )


def _counted(texts: Sequence[str]) -> Counted:
    return Counter(text for text in texts if text).most_common()


def _occluded(rows: Sequence[SampleRow], place: Floats, kept: Pictures, onlooker: Onlooker) -> list[Occluded]:
    centre = torch.from_numpy(place)
    way = float(1 - (campaigns.unit(kept.embeddings) @ place).mean())
    try:
        images = onlooker.images(rows)
    except ShardError as error:
        log.warning("%s", error)
        return []
    return [Occluded(image, occlusion_map(onlooker.embed, image, centre) / max(way, 1e-6)) for image in images]
