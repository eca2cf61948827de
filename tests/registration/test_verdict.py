"""The verdict's signs against hand-made maps, what the weights remember of their training, and --check."""

import copy
import dataclasses
import json

import nibabel
import numpy as np
import pytest
import torch

import fmsam_lib as fm
from fmsam_lib.model import weights
from fmsam_lib.model.network import GradICON
from fmsam_lib.model.spatial import identity_map
from fmsam_lib.registration.command import main
from fmsam_lib.registration.verdict import LIMITS, judge, worst
from fmsam_lib.training.seen import seen, statistics, unlike

ALIKE = {"before": 0.5, "after": 0.9}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    domain = fm.open_domain("brain-mr+knee-mr", shape=(48, 40))
    net, _ = fm.train(
        domain,
        steps=32,
        optimizer="adam",
        down=(4, 8),
        levels=2,
        last_step=False,
        batch=2,
        out=str(folder),
        progress=False,
    )
    return net, folder / "weights.pt"


@pytest.fixture(scope="module")
def pair():
    return fm.open_domain("brain-mr", shape=(48, 40), seed=7).training_pair(0)


def test_a_translation_that_comes_back_is_fine_and_one_that_does_not_is_not(trained, pair):
    net, _ = trained
    x = identity_map((48, 40))
    shift = torch.tensor([2 / 47, 0.0]).view(1, 2, 1, 1)
    said, error = judge(net, pair, x + shift, x - shift, ALIKE)
    assert (said["verdict"], said["reason"]) == ("fine", "")
    assert said["signs"]["inverse_error"] == pytest.approx(0, abs=1e-5)
    said, error = judge(net, pair, x + shift, x + shift, ALIKE)
    assert said["verdict"] == "look at it"
    assert said["reason"].startswith("there and back misses by 4 samples")
    assert said["signs"]["inverse_error"] == pytest.approx(4, abs=1e-3)
    np.testing.assert_allclose(error, 4 * pair.spacing[0], rtol=1e-4)
    json.dumps(said)


def test_only_the_fixed_mask_is_judged(trained, pair):
    """A fold and a miss outside of it are nobody's concern; the map of the error has them all the same."""
    mask = torch.zeros(1, 48, 40, dtype=torch.bool)
    mask[:, 30:] = True
    x, inside = identity_map((48, 40)), dataclasses.replace(pair, fixed_mask=mask)
    folded = x.clone()
    folded[:, 0, 5:25] = folded[:, 0, 5:25].flip(1)
    assert {*judge(trained[0], pair, folded, x, ALIKE)[0]["reason"].split("; ")} != {""}
    said, error = judge(trained[0], inside, folded, x, ALIKE)
    assert (said["verdict"], said["reason"]) == ("fine", "")
    assert [said["signs"][name] for name in ("inverse_error", "folding")] == [0, 0]
    assert said["inverse_error_mm"] == {"mean": 0, "max": 0}
    assert error.max() > 0


def test_other_signs(trained, pair):
    net, _ = trained
    x = identity_map((48, 40))
    folded = x.clone()
    folded[:, 0, 10:20] = folded[:, 0, 10:20].flip(1)
    assert "fold" in judge(net, pair, folded, folded, ALIKE)[0]["reason"]
    assert "LNCC falls" in judge(net, pair, x, x, {"before": 0.9, "after": 0.5})[0]["reason"]
    assert "still unlike each other" in judge(net, pair, x, x, {"before": -0.9, "after": -0.5})[0]["reason"]


@pytest.mark.parametrize(
    ("options", "said"), [({}, True), ({"similarity": "lncc2"}, False), ({"similarity": "mind"}, False)]
)
def test_lncc_judges_only_what_it_was_asked_to(trained, pair, tmp_path, options, said):
    """Of an image and its negative, LNCC is far below 0 wherever they lie."""
    images = [nibabel.Nifti1Image(image[0].numpy()[..., None], np.eye(4)) for image in (pair.fixed, 1 - pair.fixed)]
    verdict = fm.register(*images, trained[0], keep_worse=True, progress=False, **options).summary["verdict"]
    assert ("still unlike" in verdict["reason"]) == said
    assert ({"similarity_lost", "dissimilarity"} <= verdict["signs"].keys()) == said


def test_images_unlike_the_training_are_seen(trained, pair):
    net, _ = trained
    assert set(net.about["seen"]) == {"brain-mr", "knee-mr"}
    apart, nearest = unlike([pair.fixed, pair.moving], net.about["seen"])
    assert apart < 1.2
    assert nearest == "brain-mr"
    noise = torch.rand(1, 48, 40, generator=torch.Generator().manual_seed(0))
    assert unlike([noise, pair.fixed], net.about["seen"])[0] > 5
    still = identity_map((48, 40))
    said, _ = judge(net, fm.Pair(**vars(pair) | {"moving": 1 - noise.round()}), still, still, ALIKE)
    assert said["signs"]["unlike"] > LIMITS["unlike"][1]
    assert "unlike those of the training" in said["reason"]
    assert said["verdict"] == "look at it"
    assert np.isfinite(statistics(torch.zeros(1, 16, 16))).all()


def test_weights_that_do_not_say_what_they_saw_leave_it_unknown(pair):
    still = identity_map((48, 40))
    said, _ = judge(GradICON(2, down=(4,), levels=1), pair, still, still, ALIKE)
    assert said["verdict"] == "unknown"
    assert "do not say" in said["reason"]
    assert judge(GradICON(2, down=(4,), levels=1), pair, still, still + 0.5, ALIKE)[0]["verdict"] == "look at it"


def test_the_worst_sign_counts():
    usual = {name: low for name, (low, _) in LIMITS.items()}
    assert worst(usual) == 0
    for name, (_, limit) in LIMITS.items():
        assert worst(usual | {name: limit}) == pytest.approx(1)


def test_weights_give_what_they_were_saved_with(trained, capsys):
    _, path = trained
    found = weights.check(path)
    assert found["fine"] is True
    assert found["deviation"] < 1e-6
    assert main(["--check", "--weights", str(path)]) == 0
    assert f"SHA-256 {found['sha256']}" in capsys.readouterr().out
    again = weights.load(path)
    assert again.about == trained[0].about == copy.deepcopy(again).about


@pytest.mark.parametrize("step", range(2))
def test_a_changed_weight_is_found(trained, tmp_path, capsys, step):
    """The one value that is changed lies in any step of the network."""
    saved = torch.load(trained[1], weights_only=True)
    saved["weights"][f"steps.{step}.last.weight"].flatten()[0] += 0.5
    torch.save(saved, tmp_path / "damaged.pt")
    assert weights.check(tmp_path / "damaged.pt")["fine"] is False
    assert main(["--check", "--weights", str(tmp_path / "damaged.pt")]) == 1
    assert "wrong" in capsys.readouterr().out


def test_weights_without_a_map_are_unknown_unless_the_download_was_changed(tmp_path, capsys, monkeypatch):
    path = tmp_path / "weights" / "unigradicon.trch"
    path.parent.mkdir()
    net = GradICON(2, down=(4, 8), levels=2)
    torch.save(weights.to_icon(net), path)
    monkeypatch.setenv("FMSAM_CACHE", str(tmp_path))
    path.with_suffix(".sha256").write_text(weights.sha256(path) + "\n")
    assert main(["--check"]) == 0
    assert "unknown" in capsys.readouterr().out
    path.with_suffix(".sha256").write_text("0" * 64 + "\n")
    assert main(["--check"]) == 1
    assert "not the file that was downloaded" in capsys.readouterr().out


def test_a_file_that_the_training_did_not_read_cannot_stop_it_at_its_end():
    read = []

    class Damaged:
        name = "damaged"

        def training_pair(self, index):
            read.append(index)
            if index >= 6:
                raise fm.DataError("cut short")
            return fm.open_domain("brain-mr", shape=(32, 32)).training_pair(index)

    domains = type("Mixture", (), {"domains": [Damaged(), Damaged(), Damaged()], "training_pair": None})
    domains.training_pair = lambda self, i: Damaged().training_pair(0)
    assert len(seen(domains(), range(5, 6))) == 1  # fewer pairs than domains
    read.clear()
    assert seen(Damaged(), range(0, 6))["damaged"]["reach"] > 0
    assert read == list(range(6))
