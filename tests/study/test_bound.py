"""`studies/bound.py`: what it optimises and what it tells, on a tiny synthetic pair."""

import dataclasses

import pandas as pd
import pytest
import torch

from fmsam_lib.images.domains import open_domain
from fmsam_lib.metrics import mean_dice
from fmsam_lib.model.spatial import identity_map
from fmsam_lib.model.transform import Transform
from fmsam_lib.model.weights import pretrained
from studies import bound

SHAPE = (24, 24, 24)


@pytest.fixture(scope="module")
def pair():
    return open_domain("brain-mr", shape=SHAPE).test_pair(0)


def test_the_overlap_of_the_identity_is_dice_both_ways(pair):
    phi = Transform(SHAPE, (torch.zeros(2, 3, *SHAPE),))
    assert float(bound.overlap(phi, pair)) == pytest.approx(mean_dice(pair, identity_map(SHAPE)), abs=1e-6)
    same = dataclasses.replace(pair, moving_label=pair.fixed_label)
    assert float(bound.overlap(phi, same)) == pytest.approx(1)


def test_only_with_the_labels_the_labels_decide(pair):
    net = pretrained("3d")
    start, by_images, by_labels = (
        bound.facts(pair, bound.optimised(net, pair, **bound.LOSSES[name] | {"steps": steps}))
        for name, steps in (("labels alone", 0), ("LNCC, as in training", 10), ("labels alone", 10))
    )
    assert by_labels["dice"] > start["dice"] + 0.01
    assert by_images["lncc"] > start["lncc"] + 0.01
    assert by_labels["lncc"] < by_images["lncc"]
    assert by_labels["dice_whole"] != by_labels["dice"]


def test_a_line_is_a_loss_over_the_pairs_that_all_losses_have():
    columns = ["dice", "dice_whole", "lncc", "sdlogj", "folding_percent"]
    rows = [(name, at, *[i / 10 + j / 100] * 5) for i, name in enumerate(bound.LOSSES) for j, at in enumerate("ab")]
    table = pd.DataFrame([*rows, ("labels alone", "c", *[9.0] * 5)], columns=[*bound.KEYS, *columns])
    told = bound.shown(table)
    assert told.loss.tolist() == list(bound.LOSSES)
    assert told["Dice"].tolist() == [f"{i / 10 + 0.005:.3f}" for i in range(len(bound.LOSSES))]
