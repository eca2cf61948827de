"""What a pair, a transform, a registration and a study look like at the end of a notebook's cell."""

import re

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell

from fmsam_lib.model.spatial import identity_map
from fmsam_lib.model.transform import Transform
from fmsam_lib.pair import Pair
from fmsam_lib.plotting import cards
from fmsam_lib.study.file import read_study
from tests.conftest import PROJECT


def pair_of(shape):
    images = torch.rand(2, 1, *shape, generator=torch.Generator().manual_seed(0))
    label = (images[:1, 0] > 0.5).int()
    return Pair("a <b> c", images[0], images[1], label, label, {1: "left & right"}, (1.25,) * len(shape))


def facts(html):
    return dict(re.findall(r"<tr><th[^>]*>(.*?)</th><td[^>]*>(.*?)</td></tr>", html))


@pytest.mark.parametrize("shape", [(12, 14), (12, 14, 10)])
def test_a_pair_shows_its_images_and_facts(shape):
    shown = cards.of_pair(pair_of(shape))
    sizes = " × ".join(map(str, shape))
    spacing = " × ".join(["1.25"] * len(shape)) + " mm"
    assert facts(shown) == {"shape": sizes, "spacing": spacing, "labels": "left &amp; right"}
    assert "a &lt;b&gt; c" in shown
    assert "src='data:image/png;base64,iVBOR" in shown


@pytest.mark.parametrize("shape", [(9, 9), (9, 9, 9)])
def test_a_transform_shows_what_it_does(shape):
    x = identity_map(shape)
    twice = facts(cards.of_transform(Transform(shape, (x - 0.5,))))  # everything twice as large
    assert twice["folded"] == "0 %"
    assert twice["SDlogJ"] == "0.000"
    corner = 4 * len(shape) ** 0.5  # samples from the middle to a corner
    assert twice["displacement"].endswith(f"{corner:.2f} at most")
    mirrored = facts(cards.of_transform(Transform(shape, (torch.cat([1 - 2 * x[:, :1], 0 * x[:, 1:]], 1),))))
    assert mirrored["folded"] == "100 %"


def test_transforms_without_a_step_and_of_a_batch():
    assert facts(cards.of_transform(Transform((6, 7))))["displacement"].startswith("0.00 samples")
    batch = Transform((6, 7), (torch.zeros(3, 2, 6, 7, requires_grad=True),))
    assert facts(cards.of_transform(batch))["pairs"] == "3, this is the first"


def test_a_notebook_shows_them_by_itself(monkeypatch):
    shell = InteractiveShell()
    monkeypatch.setattr(cards, "get_ipython", lambda: shell)
    cards.show_themselves()
    data, _ = shell.display_formatter.format(pair_of((8, 8)))
    assert facts(data["text/html"])["shape"] == "8 × 8"
    data, _ = shell.display_formatter.format(Transform((8, 8)))
    assert "Transform" in data["text/html"]


def test_a_study_shows_its_grid():
    study = read_study(PROJECT / "studies" / "quick.yaml")
    shown = study._repr_html_()
    runs = len(study.train_domains) * len(study.optimizers) * len(study.seeds)
    assert facts(shown)["runs"] == str(runs)
    for name in (*study.train_domains, *study.optimizers):
        assert name in shown
