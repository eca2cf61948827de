"""Registering files: what leaves is applied by SimpleITK and by Learn2Reg's rule, and must give our own result back."""

import copy
import functools
import html
import json
import os
import re
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813, as everywhere
import torch
from matplotlib.image import imread
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial.transform import Rotation

import fmsam_lib
from fmsam_lib.checking import ConfigError
from fmsam_lib.images import grid
from fmsam_lib.model import weights
from fmsam_lib.model.network import GradICON
from fmsam_lib.parameters import Register, Registering
from fmsam_lib.plotting.slices import fitting, overview
from fmsam_lib.records import DataError
from fmsam_lib.registration import command, result
from fmsam_lib.registration.command import main, report
from fmsam_lib.registration.folder import MOVING as MOVED
from fmsam_lib.registration.folder import staged
from fmsam_lib.registration.register import register as registering
from fmsam_lib.registration.register import short
from fmsam_lib.training import instance
from fmsam_lib.training.instance import optimise
from fmsam_lib.training.losses import Batch, jittered_points, objective
from tests.conftest import Analytic, xyz

register = functools.partial(registering, keep_worse=True)  # made-up transforms make noise less alike

GRID = (16, 20, 18)
FIXED, MOVING = (21, 26, 19), (24, 22, 20)


def affine(codes="RAS", spacing=(1.0, 1.0, 1.0), angles=(0, 0, 0), origin=(0.0, 0.0, 0.0)):
    """Index to RAS mm of axes that point to `codes`, turned by Euler `angles` in degrees."""
    result = np.eye(4)
    for axis, code in enumerate(codes):
        world = next(i for i, pair in enumerate(("LR", "PA", "IS")) if code in pair)
        result[:3, axis] = 0
        result[world, axis] = spacing[axis] * (1 if code in "RAS" else -1)
    result[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ result[:3, :3]
    result[:3, 3] = origin
    return result


HEADERS = {
    "plain": affine(),
    "flipped": affine("LAS", origin=(90, -10, 5)),
    "permuted": affine("PIR", (1.2, 0.9, 1.1)),
    "oblique": affine(angles=(15, -20, 25), origin=(-40, 33, 7)),
    "anisotropic": affine(spacing=(0.8, 0.9, 2.0), origin=(3, 4, 5)),
    "all": affine("SLA", (1.1, 0.7, 1.6), (-10, 25, 12), (11, -70, 200)),
}


def texture(shape, seed=0):
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2)
    return (100 + 60 * noise / noise.std()).astype(np.float32)


def structures(shape, seed=0):
    return np.digitize(texture(shape, seed + 100), [70, 130]).astype(np.uint8)


def save(path, values, matrix=None):
    matrix = np.eye(4) if matrix is None else matrix
    nibabel.save(nibabel.Nifti1Image(values, matrix, dtype=values.dtype), path)
    return path


def network(dim=3, seed=0, strength=0.1):
    """A small network that moves things by a few voxels."""
    torch.manual_seed(seed)
    net = GradICON(dim, down=(4, 8), levels=2, last_step=False)
    for step in net.steps:
        torch.nn.init.normal_(step.last.weight, std=strength)
    return net.eval()


def still(x):
    return 0 * x


def wave(x):
    return 0.06 * torch.sin(3 * x.flip(1) + 1)


@pytest.fixture
def pair(tmp_path):
    """Files: fixed, moving, fixed labels, moving labels, and a network's weights."""
    network().save(tmp_path / "weights.pt")
    return {
        "fixed": save(tmp_path / "fixed.nii.gz", texture(FIXED, 1), HEADERS["plain"]),
        "moving": save(tmp_path / "moving.nii.gz", texture(MOVING, 2), HEADERS["all"]),
        "fixed_labels": save(tmp_path / "fixed_labels.nii.gz", structures(FIXED, 1), HEADERS["plain"]),
        "labels": save(tmp_path / "labels.nii.gz", structures(MOVING, 2), HEADERS["all"]),
        "weights": tmp_path / "weights.pt",
    }


def apply_with_itk(moving, fixed, field, method=None):
    """The moving file through the displacement field's file, by SimpleITK, `(X, Y, Z)` in the fixed file's order."""
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(field), sitk.sitkVectorFloat64))
    method = sitk.sitkLinear if method is None else method
    image = sitk.Resample(sitk.ReadImage(str(moving)), sitk.ReadImage(str(fixed)), transform, method, 0.0)
    return sitk.GetArrayFromImage(image).T


def apply_as_learn2reg(moving, field, order=1):
    values, field = np.asanyarray(nibabel.load(moving).dataobj), nibabel.load(field).get_fdata()
    return map_coordinates(values, np.indices(field.shape[:-1]) + np.moveaxis(field, -1, 0), order=order)


def overlap(a, b):
    return [2 * ((a == n) & (b == n)).sum() / ((a == n).sum() + (b == n).sum()) for n in (1, 2)]


def in_voxels(result):
    """Index in the moving file minus index in the fixed file, `(D, X, Y, Z)`."""
    return np.moveaxis(result.learn2reg().get_fdata(), -1, 0)


def seen(result, moving_shape, margin=1):
    """Where a result looks well inside the moving image, `margin` voxels from its border."""
    field = in_voxels(result)
    index = np.indices(field.shape[1:]) + field
    moving_shape = moving_shape[: len(field)]
    end = np.array(moving_shape).reshape(-1, *[1] * len(field)) - 1 - margin
    return ((index >= margin) & (index <= end)).all(0)


def gap(a, b, where=...):
    """The largest difference, of the second image's intensity range."""
    return np.abs(np.asarray(a, float) - b)[where].max() / np.ptp(b)


# What leaves


@pytest.mark.parametrize(
    ("fixed_header", "moving_header"),
    [
        ("plain", "plain"),
        ("plain", "all"),
        ("flipped", "plain"),
        ("permuted", "oblique"),
        ("oblique", "flipped"),
        ("anisotropic", "permuted"),
        ("all", "anisotropic"),
        ("all", "oblique"),
    ],
)
def test_itk_and_learn2reg_get_our_own_result_from_the_files(tmp_path, fixed_header, moving_header):
    fixed = save(tmp_path / "fixed.nii.gz", texture(FIXED, 1), HEADERS[fixed_header])
    moving = save(tmp_path / "moving.nii.gz", texture(MOVING, 2), HEADERS[moving_header])
    labels = save(tmp_path / "labels.nii.gz", structures(MOVING, 2), HEADERS[moving_header])
    result = register(fixed, moving, network(), shape=GRID)
    resting = register(fixed, moving, Analytic(still), shape=GRID)
    assert np.abs(in_voxels(result) - in_voxels(resting))[:, 3:-3, 3:-3, 3:-3].max() > 2  # something moves
    sitk.WriteImage(result.displacement, str(tmp_path / "itk.nii.gz"))
    nibabel.save(result.learn2reg(), tmp_path / "disp.nii.gz")

    assert gap(apply_with_itk(moving, fixed, tmp_path / "itk.nii.gz"), xyz(result.warped)) < 1e-4
    inside = seen(result, MOVING, margin=0)
    assert inside.mean() > 0.7
    assert gap(apply_as_learn2reg(moving, tmp_path / "disp.nii.gz"), xyz(result.warped), inside) < 1e-4

    ours, truth = xyz(result.warp_labels(labels)), structures(FIXED, 1)
    itk = apply_with_itk(labels, fixed, tmp_path / "itk.nii.gz", sitk.sitkNearestNeighbor)
    np.testing.assert_allclose(overlap(itk, truth), overlap(ours, truth), atol=2e-3)
    rule = apply_as_learn2reg(labels, tmp_path / "disp.nii.gz", order=0)
    assert (rule == ours)[inside].mean() > 0.9999
    assert ours.dtype == np.uint8


def test_what_is_written_has_the_fixed_files_geometry_and_the_forms_that_others_read(tmp_path, pair):
    result = register(pair["fixed"], pair["moving"], pair["weights"], shape=GRID, labels=pair["labels"])
    result.save(tmp_path / "out")
    fixed = sitk.ReadImage(str(pair["fixed"]))
    for name, kind in (("warped", "32-bit float"), ("labels", "8-bit unsigned integer")):
        image = sitk.ReadImage(str(tmp_path / "out" / f"{name}.nii.gz"))
        assert image.GetPixelIDTypeAsString() == kind
        assert (image.GetSize(), image.GetOrigin(), image.GetDirection()) == (
            (fixed.GetSize(), fixed.GetOrigin(), fixed.GetDirection())
        )
    field = nibabel.load(tmp_path / "out" / "displacement.nii.gz")
    assert field.shape == (*FIXED, 1, 3)
    assert field.header["intent_code"] == 1007
    assert field.get_data_dtype() == np.float32
    field = nibabel.load(tmp_path / "out" / "disp_fixed_moving.nii.gz")
    assert field.shape == (*FIXED, 3)
    np.testing.assert_allclose(field.affine, nibabel.load(pair["fixed"]).affine, atol=1e-6)
    said = "verdict: {verdict}, {reason}".format(**result.summary["verdict"])
    expected = overview(result.pair, result.phi.map, said)
    expected.savefig(tmp_path / "expected.png", dpi=fitting(expected))
    np.testing.assert_array_equal(*(imread(tmp_path / name) for name in ("out/overview.png", "expected.png")))


@pytest.mark.parametrize(
    ("fixed_header", "moving_header"), [("plain", "all"), ("all", "permuted"), ("oblique", "flipped")]
)
def test_a_known_transform_of_a_known_image(fixed_header, moving_header):
    """The moving image is a ramp over its canonical axes: the warped one is the ramp of phi, exactly."""
    weights = np.array([100.0, 40.0, 70.0])

    def unit(header, shape):  # canonical unit coordinates of a file's voxels, by way of the world
        image = nibabel.Nifti1Image(np.zeros(shape, np.uint8), header)
        canonical = nibabel.as_closest_canonical(image)
        matrix = np.linalg.inv(canonical.affine) @ header
        index = np.tensordot(matrix[:3, :3], np.indices(shape), 1) + matrix[:3, 3].reshape(3, 1, 1, 1)
        grid = 64  # samples a side, edge on edge with the file
        return ((index + 0.5) / np.array(canonical.shape).reshape(3, 1, 1, 1) * grid - 0.5) / (grid - 1)

    ramp = np.tensordot(weights, unit(HEADERS[moving_header], MOVING), 1).astype(np.float32)
    moving = nibabel.Nifti1Image(ramp, HEADERS[moving_header])
    fixed = nibabel.Nifti1Image(texture(FIXED), HEADERS[fixed_header])
    result = register(fixed, moving, Analytic(wave), shape=(64, 64, 64))
    x = unit(HEADERS[fixed_header], FIXED)
    phi = x + wave(torch.from_numpy(x)[None])[0].numpy()
    inside = ((x > 0) & (x < 1) & (phi > 0.03) & (phi < 0.97)).all(0)  # between the voxels' centres
    assert inside.mean() > 0.5
    expected = np.tensordot(weights, phi, 1)
    assert gap(xyz(result.warped), expected, inside) < 2e-4


@pytest.mark.parametrize("codes", ["LAS", "PIR", "SLA", "LPS"])
def test_the_storage_order_changes_nothing(codes):
    """Either image stored in another orientation: the same map in the world, the same warped image."""
    fixed = nibabel.Nifti1Image(texture(FIXED, 1), HEADERS["oblique"])
    moving = nibabel.Nifti1Image(texture(MOVING, 2), HEADERS["anisotropic"])

    def stored(image):
        turn = nibabel.orientations.ornt_transform(
            nibabel.io_orientation(image.affine), nibabel.orientations.axcodes2ornt(codes)
        )
        return image.as_reoriented(turn)

    expected = xyz(register(fixed, moving, network(), shape=GRID).warped)
    turned = register(fixed, stored(moving), network(), shape=GRID)
    assert gap(xyz(turned.warped), expected) < 1e-4
    turned = register(stored(fixed), moving, network(), shape=GRID)
    written = nibabel.Nifti1Image(xyz(turned.warped), grid.affine(turned.warped))
    assert "".join(nibabel.aff2axcodes(written.affine)) == codes
    back = nibabel.as_closest_canonical(written)
    np.testing.assert_allclose(back.affine, HEADERS["oblique"], atol=1e-4)
    assert gap(back.get_fdata(), expected) < 1e-4


def test_an_untrained_network_lays_the_edges_of_the_fields_of_view_over_each_other():
    """Twice as many voxels of half the size: each fixed voxel is the mean of the eight that it covers."""
    fixed, values = nibabel.Nifti1Image(texture((21, 26, 19)), HEADERS["plain"]), texture((42, 52, 38), 2)
    half = affine(spacing=(0.5, 0.5, 0.5), origin=(-0.25, -0.25, -0.25))
    net = GradICON(3, down=(4, 8), levels=2)
    result = register(fixed, nibabel.Nifti1Image(values, half), net, shape=GRID)
    assert gap(xyz(result.warped), values.reshape(21, 2, 26, 2, 19, 2).mean((1, 3, 5))) < 1e-4
    np.testing.assert_allclose(xyz(result.displacement), 0, atol=1e-4)  # and so do the headers here
    assert result.summary["folding_percent"] == 0
    half[:3, 3] += (100, -20, 3)
    moved = xyz(register(fixed, nibabel.Nifti1Image(values, half), net, shape=GRID).displacement)
    np.testing.assert_allclose(moved, np.broadcast_to((-100, 20, 3), (21, 26, 19, 3)), atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [
        ((40, 36), affine("LAS", (0.7, 0.9, 1))),
        ((40, 36), affine("PLS")),
        ((40, 36, 1), affine("LAS", (0.7, 0.9, 5), origin=(4, 5, 6))),
        ((40, 1, 36), affine("RSA", (0.7, 5, 0.9))),
        ((1, 40, 36), affine("ILP", (5, 0.7, 0.9), (10, 20, 30))),
    ],
)
def test_two_dimensional_files(tmp_path, shape, matrix):
    size = dict(zip((n for n in shape if n > 1), (44, 34), strict=True))
    moving_shape = tuple(size.get(n, 1) for n in shape)
    moving_matrix = matrix.copy()
    moving_matrix[:2, 3] += (3, -2)  # also out of the plane, where there is one
    fixed = save(tmp_path / "fixed.nii.gz", texture(shape, 1), matrix)
    moving = save(tmp_path / "moving.nii.gz", texture(moving_shape, 2), moving_matrix)
    result = register(fixed, moving, network(2), shape=(32, 28))
    result.save(tmp_path / "out")
    ours = nibabel.load(tmp_path / "out" / "warped.nii.gz").get_fdata()
    assert ours.shape[: len(shape)] == shape
    assert np.abs(in_voxels(result)).max() > 2
    assert gap(apply_with_itk(moving, fixed, tmp_path / "out" / "displacement.nii.gz"), ours.reshape(shape)) < 1e-4
    field = tmp_path / "out" / "disp_fixed_moving.nii.gz"
    assert nibabel.load(field).shape == (*shape, len(shape))
    inside = seen(result, moving_shape, margin=0)
    assert gap(apply_as_learn2reg(moving, field), ours.reshape(shape), inside) < 1e-4


def test_outside_the_moving_image_is_its_background():
    fixed = nibabel.Nifti1Image(texture(FIXED), np.eye(4))
    half = Analytic(lambda x: 0 * x + 0.5)
    values = (texture(MOVING) + 500).clip(20, 900)
    filled, centred = values.copy(), values - 600
    filled[:2] = -32768
    cases = [("mr", values, 0), ("ct", values, -1000), ("mr", filled, 0), ("mr", centred, centred.min())]
    for modality, image, background in cases:
        moving = nibabel.Nifti1Image(image, np.eye(4))
        warped = xyz(register(fixed, moving, half, shape=GRID, modality="mr", moving_modality=modality).warped)
        assert (warped[-3:, -3:, -3:] == np.float32(background)).all()
        assert (warped[:9, :12, :8] > background).all()


def test_label_images(tmp_path, pair):
    result = register(pair["fixed"], pair["moving"], network(), shape=GRID)
    expected = xyz(result.warp_labels(pair["labels"]))
    values = structures(MOVING, 2)
    for kind in (np.int16, np.uint16, np.int64):
        large = 70_000_001 if kind == np.int64 else 300  # more than float32 can count to
        warped = result.warp_labels(save(tmp_path / "l.nii.gz", values.astype(kind) * large, HEADERS["all"]))
        assert xyz(warped).dtype == kind
        np.testing.assert_array_equal(xyz(warped), expected.astype(kind) * large)
    turned = nibabel.as_closest_canonical(nibabel.load(pair["labels"]))  # their own orientation, the same place
    np.testing.assert_array_equal(xyz(result.warp_labels(turned)), expected)
    whole = result.warp_labels(save(tmp_path / "l.nii.gz", values.astype(np.float32), HEADERS["all"]))
    np.testing.assert_array_equal(xyz(whole), expected)
    for wrong, message in (
        (values / np.float32(4), "expected whole numbers"),
        (values[:-1], "expected the shape"),
        (0 * values, "only background"),
    ):
        with pytest.raises(DataError, match=message):
            result.warp_labels(save(tmp_path / "l.nii.gz", wrong, HEADERS["all"]))
    with pytest.raises(DataError, match=r"grids .* voxels apart"):
        result.warp_labels(save(tmp_path / "l.nii.gz", values, HEADERS["all"] @ np.diag([1, 1, 1.1, 1])))


def test_the_summary_says_how_it_went(tmp_path, pair):
    files = [pair["fixed"], pair["moving"], pair["weights"]]
    result = register(*files, shape=GRID, labels=pair["labels"], fixed_labels=pair["fixed_labels"])
    summary = result.summary
    ours = xyz(result.warp_labels(pair["labels"]))
    after = [summary["dice"][n]["after"] for n in ("1", "2")]
    np.testing.assert_allclose(after, overlap(ours, structures(FIXED, 1)), atol=1e-12)
    resting = register(*files[:2], Analytic(still), shape=GRID)
    before = [summary["dice"][n]["before"] for n in ("1", "2")]
    rest = xyz(resting.warp_labels(pair["labels"]))
    np.testing.assert_allclose(before, overlap(rest, structures(FIXED, 1)), atol=2e-3)
    assert summary["similarity"]["before"] != summary["similarity"]["after"]
    assert summary["folding_percent"] > 0
    assert summary["sdlogj"] > 0
    assert summary["seconds"] > 0
    assert summary["network"]["weights"] == str(pair["weights"])
    assert {"commit", "packages"} <= summary["provenance"].keys()
    assert "instance_optimisation" not in summary
    json.dumps(summary)
    shown = result._repr_html_()  # what a cell shows
    similarity = summary["similarity"]
    assert "{before:.3f} before, {after:.3f} after".format(**similarity) in shown
    assert html.escape(result.summary["verdict"]["reason"]) in shown
    result.summary["sdlogj"] = 0.1234  # of the part within a mask, say
    assert "0.123<" in result._repr_html_()


def test_a_label_of_one_image_alone_has_no_dice(tmp_path, pair):
    """As in `measure`: nobody could have brought it there."""
    values = structures(MOVING, 2)
    labels = save(tmp_path / "few.nii.gz", np.where(values == 2, 3, values).astype(np.uint8), HEADERS["all"])
    with pytest.warns(UserWarning, match=r"no Dice of the labels \[2, 3\]: only one of the two images has them"):
        result = register(
            pair["fixed"], pair["moving"], network(), shape=GRID, labels=labels, fixed_labels=pair["fixed_labels"]
        )
    assert result.summary["dice"].keys() == {"1"}
    assert "no Dice of the labels [2, 3]" in result.summary["notes"][-1]


def test_a_registration_that_lowers_the_dice_of_given_labels_is_not_fine(tmp_path):
    """The verdict needs no labels; where they are given, it does not look away."""
    fixed, labels = (
        save(tmp_path / name, made(FIXED, 1)) for name, made in (("f.nii", texture), ("l.nii", structures))
    )
    net = network(strength=0.3)
    marks = {"labels": labels, "fixed_labels": labels}
    result = register(fixed, fixed, net, shape=GRID, keep_worse=True, **marks)
    before, after = (np.mean([d[when] for d in result.summary["dice"].values()]) for when in ("before", "after"))
    assert before == 1
    assert after < 0.95
    assert result.summary["verdict"]["verdict"] == "look at it"
    assert result.summary["verdict"]["reason"].startswith(f"mean Dice falls from 1.000 to {after:.3f}")
    still = register(fixed, fixed, GradICON(3, down=(4, 8), levels=2).eval(), shape=GRID, **marks)
    assert "Dice" not in still.summary["verdict"]["reason"]


def test_a_grid_far_from_the_networks_own_is_told(pair):
    net = network()
    net.shape = tuple(2 * side for side in GRID)
    with pytest.warns(UserWarning, match=r"the network was trained on \(.*\) samples: \(.*\) may register far worse"):
        result = register(pair["fixed"], pair["moving"], net, shape=GRID)
    assert any("may register far worse" in note for note in result.summary["notes"])


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("LungCT_0012_0001.nii.gz", "0012"),
        ("hippocampus_311.nii.gz", "hippocampus_311"),
        ("a.b.nii", "a.b"),
        ("brain.mgz", "brain"),
        ("OASIS_0001_0000.nii.gz", "0001"),
    ],
)
def test_learn2reg_calls_images_by(file, name):
    assert short(file) == name


# Instance optimisation


def optimised(net, steps, **options):
    moving, fixed = (torch.from_numpy(texture(GRID, seed))[None, None] / 300 for seed in (1, 2))
    settings = {"lr": 3e-3, "lmbda": 1.5, "sigma": 2.0, "seed": 3, "progress": False} | options
    return (moving, fixed), optimise(net, moving, fixed, steps=steps, **settings)[:3]


def test_instance_optimisation_lowers_the_loss_and_leaves_the_network_alone():
    net = network(strength=0.01).train()
    before = copy.deepcopy(net.state_dict())
    images, (phi, losses, best) = optimised(net, 8)
    assert len(losses) == 9
    assert best == int(np.argmin(losses)) > 0
    assert min(losses) < 0.9 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert not [p for p in net.parameters() if p.grad is not None]
    assert not net._forward_hooks
    _, again = optimised(net, 8)
    assert again[1] == losses
    assert torch.equal(again[0].map, phi.map)
    with torch.no_grad():
        assert torch.equal(optimised(net, 0)[1][0].map, copy.deepcopy(net).eval()(*images).map)


def test_frozen_layers_stay_unless_all_are():
    net = network(strength=0.01)
    free = optimised(net, 3)[1][1]
    assert optimised(copy.deepcopy(net).requires_grad_(False), 3)[1][1] == free
    net.steps[0].requires_grad_(False)
    part = optimised(net, 3)[1][1]
    assert part[0] == free[0]
    assert part[3] != free[3]


def test_directions_optimised_apart_come_back_both():
    net = network(strength=0.01)
    images, _ = optimised(net, 0)
    phi, _, _, back = optimise(
        net, *images, steps=2, lr=3e-3, lmbda=1.5, sigma=2.0, seed=3, progress=False, joint=False
    )
    assert len(phi) == len(back) == 1
    assert not torch.equal(phi.map, back.map)


def test_the_kept_transform_is_that_of_the_best_step():
    """Against an optimisation of our own that keeps every network."""
    net = network(strength=0.01)
    (moving, fixed), (phi, losses, best) = optimised(net, 6, lr=0.05)
    assert best < 6  # such a rate overshoots
    ours, generator = copy.deepcopy(net), torch.Generator().manual_seed(3)
    optimizer = torch.optim.Adam(ours.parameters(), lr=0.05)
    for step in range(best + 1):
        batch = Batch(moving, fixed, jittered_points(GRID, generator))
        loss = objective(ours, batch, lmbda=1.5, sigma=2.0).total
        assert loss.item() == pytest.approx(losses[step], abs=1e-6)
        if step < best:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(ours(moving, fixed).map, phi.map, atol=1e-6, rtol=0)


def test_a_loss_that_is_not_finite_ends_it_with_the_best_so_far(monkeypatch, pair):
    calls = []

    def breaks(*args, **options):
        calls.append(objective(*args, **options))
        return calls[-1]._replace(total=calls[-1].total * (float("nan") if len(calls) > 3 else 1))

    monkeypatch.setattr(instance, "objective", breaks)
    with pytest.warns(UserWarning, match="not finite at step 3; the best before counts"):
        result = register(pair["fixed"], pair["moving"], network(), shape=GRID, io=9, lr=1e-4, progress=False)
    assert len(result.losses) == 3
    assert result.summary["instance_optimisation"]["steps"] == 2
    assert result.summary["instance_optimisation"]["steps_asked"] == 9
    assert "not finite" in result.summary["notes"][0]
    assert result.phi.map.isfinite().all()


@pytest.mark.parametrize("io", [0, 2])
def test_damaged_weights_are_found(pair, io):
    net = network()
    net.steps[0].last.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"expected a finite .* damaged"):
        register(pair["fixed"], pair["moving"], net, shape=GRID, io=io, progress=False)


# Headers in doubt


def with_codes(path, values, qform, qcode, sform, scode, unit="mm"):
    header = nibabel.Nifti1Header()
    header.set_data_shape(values.shape)
    header.set_data_dtype(values.dtype)
    header.set_zooms((1.0, 1.2, 0.9) if qform is None else (1.0, 1.0, 1.0))
    header.set_qform(qform, qcode)
    header.set_sform(sform, scode)
    header.set_xyzt_units(*np.atleast_1d(unit))
    nibabel.save(nibabel.Nifti1Image(values, header.get_best_affine(), header), path)
    written = nibabel.load(path).header
    assert (written["qform_code"], written["sform_code"]) == (qcode, scode)
    return path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ((None, 0, None, 0), "states no orientation"),
        ((HEADERS["flipped"], 1, HEADERS["all"], 2), "qform, sform and pixdim disagree"),
        ((HEADERS["flipped"], 1, HEADERS["all"], 1), "qform, sform and pixdim disagree"),
        ((HEADERS["plain"], 1, HEADERS["plain"] @ np.diag([-1, 1, 1, 1]), 2), "qform, sform and pixdim disagree"),
        ((HEADERS["plain"] @ np.diag([1, 1, -1, 1]), 1, HEADERS["plain"], 1), "qform, sform and pixdim disagree"),
        ((HEADERS["flipped"], 1, HEADERS["flipped"], 1), None),
        ((HEADERS["flipped"], 1, None, 0), None),
        ((HEADERS["oblique"], 1, None, 0), None),
        ((HEADERS["oblique"], 1, HEADERS["oblique"], 4), None),
        ((HEADERS["oblique"], 1, HEADERS["oblique"] * [2, 1, 1, 1], 2), "qform, sform and pixdim disagree"),
        (
            (None, 0, HEADERS["anisotropic"], 2),
            "qform, sform and pixdim disagree; as for ITK, the spacing is 1 x 1.2 x 0.9",
        ),
        ((HEADERS["oblique"], 1, HEADERS["oblique"], 1, "micron"), None),
        ((HEADERS["oblique"], 1, HEADERS["oblique"], 1, ["micron", "sec"]), None),
        ((HEADERS["oblique"], 1, HEADERS["oblique"], 1, "meter"), None),
    ],
)
def test_the_transform_fits_the_geometry_that_itk_reads(tmp_path, recwarn, header, message):
    fixed = with_codes(tmp_path / "fixed.nii.gz", texture(FIXED, 1), *header)
    moving = with_codes(tmp_path / "moving.nii.gz", texture(MOVING, 2), *header)
    result = register(fixed, moving, network(), shape=GRID)
    assert [str(w.message) for w in recwarn] == result.summary["notes"]
    for name in ("fixed", "moving"):
        notes = [note for note in result.summary["notes"] if f"{name}.nii.gz: " in note]
        assert [note for note in notes if message and message in note] or (message is None and not notes)
    sitk.WriteImage(result.displacement, str(tmp_path / "itk.nii.gz"))
    assert gap(apply_with_itk(moving, fixed, tmp_path / "itk.nii.gz"), xyz(result.warped)) < 1e-3
    sitk.WriteImage(result.warped, str(tmp_path / "warped.nii.gz"))
    written, there = (sitk.ReadImage(str(tmp_path / f"{name}.nii.gz")) for name in ("warped", "fixed"))
    np.testing.assert_allclose(written.GetOrigin(), there.GetOrigin(), rtol=1e-6)
    np.testing.assert_allclose(written.GetDirection(), there.GetDirection(), atol=1e-6)


def test_a_sheared_header_is_refused(tmp_path, pair):
    sheared = np.eye(4)
    sheared[0, 1] = 0.2
    fixed = save(tmp_path / "sheared.nii.gz", texture(FIXED), sheared)
    with pytest.raises(DataError, match=r"sheared.nii.gz: expected axes perpendicular .* Resample it without shear"):
        register(fixed, pair["moving"], network(), shape=GRID)


def test_an_orientation_that_only_one_header_states_is_not_guessed(tmp_path, pair):
    silent = with_codes(tmp_path / "silent.nii.gz", texture(MOVING), None, 0, None, 0)
    expected = r"silent.nii.gz: expected a header that states the orientation, as .*fixed.nii.gz"
    with pytest.raises(DataError, match=expected):
        register(pair["fixed"], silent, network(), shape=GRID)


# Bad input


def bad(values, matrix=None):
    return lambda path: save(path, values, matrix)


def singular(path):
    image = nibabel.Nifti1Image(texture(MOVING), None)
    image.header["sform_code"], image.header["srow_x"][0] = 1, 1
    nibabel.save(image, path)


def cut_short(path):
    save(path, texture(MOVING))
    path.write_bytes(path.read_bytes()[:2000])


RGB = np.zeros(MOVING, [("R", "u1"), ("G", "u1"), ("B", "u1")])
BAD = {
    "4-D": (bad(texture((*MOVING, 2))), "a 2-D or 3-D image", r"\(24, 22, 20, 2\)\. Save one of its volumes"),
    "2-D": (bad(texture((24, 22))), "a 3-D image", r"\(24, 22\)"),
    "RGB": (bad(RGB), "one real number a voxel", "vector of 8-bit"),
    "singular": (singular, "an invertible affine", "Set its spacing"),
    "all zero": (bad(np.zeros(MOVING, np.uint8)), "an image that varies", "0 throughout"),
    "not a number": (bad(np.full(MOVING, np.nan, np.float32)), "finite values", "NaN"),
    "far larger": (bad(texture(MOVING), affine(spacing=(1, 1, 4.0))), "a field of view like", r"Crop or pad one"),
    "metres": (
        bad(texture(MOVING), affine(spacing=[1e-3] * 3)),
        "a field of view like",
        r"about 0\.001 times: is a spacing lost",
    ),
    "cut short": (cut_short, "a readable image", "copy it again"),
    "text": (lambda path: path.write_text("hello"), "a readable image", "copy it again"),
    "none": (lambda path: None, "an image file", "no such file"),
    "folder": (lambda path: path.mkdir(), "a folder with one DICOM series", "0"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_images_get_a_clear_message_and_leave_nothing(tmp_path, pair, capsys, what):
    make, expected, found = BAD[what]
    make(tmp_path / "bad.nii.gz")
    with pytest.raises(DataError, match=rf"bad.nii.gz: expected {expected}.*, found .*{found}"):
        register(pair["fixed"], tmp_path / "bad.nii.gz", network(), shape=GRID)
    assert run(pair, tmp_path / "out", "--moving", tmp_path / "bad.nii.gz") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "bad.nii.gz: expected" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["scan.mha", "scan.dcm", "scan.nrrd"])
def test_other_formats_are_to_be_converted(tmp_path, pair, name):
    (tmp_path / name).write_bytes(bytes(500))
    with pytest.raises(DataError, match=rf"{name}: expected a readable image"):
        register(tmp_path / name, pair["moving"], network(), shape=GRID)


def test_other_formats_that_nibabel_reads(tmp_path):
    fixed, moving = tmp_path / "fixed.mgz", tmp_path / "moving.hdr"
    nibabel.save(nibabel.MGHImage(texture(FIXED), HEADERS["all"]), fixed)
    nibabel.save(nibabel.Nifti1Pair(texture(MOVING), HEADERS["oblique"]), moving)
    result = register(fixed, moving, network(), shape=GRID)
    names = [path.name for path in result.save(tmp_path / "out")]
    assert "disp_fixed_moving.nii.gz" in names
    nifti = save(tmp_path / "fixed.nii.gz", texture(FIXED), HEADERS["all"])
    field = tmp_path / "out" / "displacement.nii.gz"
    assert gap(apply_with_itk(moving, nifti, field), xyz(result.warped)) < 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": None}, r"expected 3 numbers as `shape` \(--shape\) of a 3-D network, got none"),
        ({"shape": (16, 16)}, r"expected 3 numbers as `shape` \(--shape\) of a 3-D network, got \[16, 16\]"),
        ({"shape": (16, 16, 8)}, "shape: expected at least 16, got 8"),
        ({"shape": (1, 32, 32)}, "shape: expected at least 16, got 1"),
        ({"shape": (16.5, 32, 32)}, "shape: expected a whole number, got 16.5"),
        ({"shape": 32}, "shape: expected a list, got 32"),
        ({"similarity": "ncc"}, "similarity: expected one of lncc, lncc2 or mind, got 'ncc'"),
        ({"io": 1.5}, "io: expected a whole number, got 1.5"),
        ({"modality": "us"}, "modality: expected one of mr or ct, got 'us'"),
        ({"moving_modality": "us"}, "moving_modality: expected one of '', mr or ct, got 'us'"),
        ({"io": -1}, "io: expected at least 0, got -1"),
        (
            {"lr": 0, "lmbda": -1, "sigma": float("nan")},
            r"3 problems in register's .*- lr: .* 0\n- lmbda: .* -1",
        ),
        ({"sigmo": 3.0}, r"sigmo: unknown; .*did you mean sigma\?"),
    ],
)
def test_impossible_options(pair, options, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        register(pair["fixed"], pair["moving"], network(), **{"shape": GRID} | options)


@pytest.mark.filterwarnings("ignore:Dynamo detected")
def test_what_is_no_network_of_ours(pair):
    for net in ((network(), []), None, torch.nn.Linear(1, 1)):
        with pytest.raises(ConfigError, match=f"a network or its weights, got {type(net).__name__}: fm.load"):
            register(pair["fixed"], pair["moving"], net, shape=GRID)
    with pytest.raises(ValueError, match=r"got .*net\.float\(\)"):
        register(pair["fixed"], pair["moving"], network().double(), shape=GRID)
    compiled = torch.compile(network(), backend="eager")
    assert register(pair["fixed"], pair["moving"], compiled, shape=GRID).phi.shape == GRID


def test_none_stands_for_an_options_default(pair):
    nothing = dict.fromkeys(Registering.model_fields) | {"shape": GRID, "keep_worse": True}
    one, two = (register(pair["fixed"], pair["moving"], network(), **how) for how in (nothing, {"shape": GRID}))
    assert torch.equal(one.phi.map, two.phi.map)
    assert one.summary["modality"] == {"fixed": "mr", "moving": "mr"}


def test_slices_of_two_orientations_are_refused():
    axial = nibabel.Nifti1Image(texture((40, 44, 1), 1), np.eye(4))
    coronal = nibabel.Nifti1Image(texture((40, 1, 44), 2), np.eye(4))
    net = GradICON(2, down=(4, 8), levels=2)
    with pytest.raises(DataError, match=r"a slice along left-right and back-front.*one along left-right and down-up"):
        register(axial, coronal, net, shape=(32, 32))


def test_optimises_where_gradients_are_switched_off(pair):
    with torch.no_grad():
        result = register(pair["fixed"], pair["moving"], network(), shape=GRID, io=2, lr=1e-3, progress=False)
    assert len(result.losses) == 3


def test_files_are_looked_at_before_weights_are_fetched(tmp_path, pair, monkeypatch, capsys):
    monkeypatch.setattr(command, "load", lambda *_: pytest.fail("asked for weights first"))
    assert run(pair, tmp_path / "out", "--moving", tmp_path / "nope.nii.gz") == 1
    assert "no such file" in capsys.readouterr().err


def test_folders_made_for_nothing_are_removed(tmp_path, pair):
    assert run(pair, tmp_path / "a" / "b" / "out", grid=GRID[:2]) == 1
    assert not (tmp_path / "a").exists()


def test_the_grid_that_the_network_was_trained_on_counts_unless_another_is_given(pair):
    net = network()
    net.shape = (18, 16, 17)
    assert register(pair["fixed"], pair["moving"], net).phi.shape == (18, 16, 17)
    assert register(pair["fixed"], pair["moving"], net, shape=GRID).phi.shape == GRID


def test_networks_and_images_of_other_dimensions(tmp_path, pair):
    with pytest.raises(DataError, match="a single slice, for this 2-D network, found a volume"):
        register(pair["fixed"], pair["moving"], network(2), shape=(16, 16))
    plane = save(tmp_path / "plane.nii.gz", texture((30, 30, 1)))
    with pytest.raises(DataError, match="expected a 3-D image"):
        register(plane, plane, network(), shape=GRID)


@pytest.mark.parametrize("damage", ["truncated", "another architecture", "another file", "missing"])
def test_weights_that_are_none(tmp_path, pair, capsys, damage):
    whole = pair["weights"].read_bytes()
    if damage == "truncated":
        pair["weights"].write_bytes(whole[: len(whole) // 2])
    elif damage == "another architecture":
        saved = torch.load(pair["weights"], weights_only=True)
        torch.save(saved | {"settings": saved["settings"] | {"down": [8, 16], "up": [8, 16]}}, pair["weights"])
    elif damage == "another file":
        pair["weights"].write_text("not weights")
    else:
        pair["weights"].unlink()
    assert run(pair, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "weights.pt" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


# The folder of results


def run(files, out, *more, grid=GRID):
    """`fmsam-register` in this process; later options override earlier ones."""
    options = ["--fixed", files["fixed"], "--moving", files["moving"], "--out", out, "--weights", files["weights"]]
    return main([*map(str, [*options, "--shape", *grid, *more])])


def visible(folder):
    return sorted(path.name for path in folder.iterdir())


ALL = ["disp_fixed_moving.nii.gz", "displacement.nii.gz", "inverse_displacement.nii.gz", "inverse_error.nii.gz"]
ALL += ["inverse_transform.h5"]
ALL += ["jacobian.nii.gz", "overview.png", "summary.json", "transform.h5", "warped.nii.gz"]


def test_a_folder_that_cannot_be_written_is_found_before_the_work(tmp_path, pair, capsys, monkeypatch):
    monkeypatch.setattr(command, "register", lambda *a, **k: pytest.fail("worked although nothing can be written"))
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        assert run(pair, place) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {place}: expected a folder to write the results into, found ")


def test_a_read_only_folder(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root may write anywhere
        with pytest.raises(DataError, match=r"locked: expected a folder to write .*, found Permission denied"):
            staged(locked).__enter__()
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("room", [1000, 40_000])
def test_a_full_disk_leaves_nothing_and_the_results_that_were_there(tmp_path, pair, capsys, room):
    """No file may grow beyond `room` bytes: the system itself refuses to write on."""
    assert run(pair, tmp_path / "old", "--quiet") == 0
    old = {name: (tmp_path / "old" / name).read_bytes() for name in visible(tmp_path / "old")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        codes = [run(pair, tmp_path / "new"), run(pair, tmp_path / "old", "--io", "1", "--lr", "0.1", "--quiet")]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert codes == [1, 1]
    assert "expected room for the results, found File too large" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert {name: (tmp_path / "old" / name).read_bytes() for name in visible(tmp_path / "old")} == old


def test_an_interruption_leaves_nothing(tmp_path, pair, capsys, monkeypatch):
    original, saved = result.write, []

    def interrupt(image, path):
        original(image, path)
        saved.append(path)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(result, "write", interrupt)
    assert run(pair, tmp_path / "out") == 130
    assert len(saved) == 2
    assert "interrupted: nothing was written of what was at work" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


KILLED = """
import sys, time
from fmsam_lib.registration import result
from fmsam_lib.registration.command import main
original = result.write
def slow(image, path):
    original(image, path)
    print("one written", flush=True)
    time.sleep(60)
result.write = slow
sys.exit(main(sys.argv[1:]))
"""


def test_a_kill_midway_leaves_nothing_that_looks_complete(tmp_path, pair):
    assert run(pair, tmp_path / "out", "--quiet") == 0
    old = {name: (tmp_path / "out" / name).read_bytes() for name in visible(tmp_path / "out")}
    options = [part for name in ("fixed", "moving", "weights") for part in (f"--{name}", str(pair[name]))]
    options += ["--out", str(tmp_path / "out"), "--shape", *map(str, GRID), "--io", "1", "--lr", "0.1"]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout.readline() == "one written\n"
    process.kill()
    assert process.wait(20) == -signal.SIGKILL
    (left,) = set(visible(tmp_path / "out")) - set(old)  # a hidden folder, which nobody takes for results
    assert left.startswith(".fmsam-")
    assert left.endswith(".partial")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in old} == old


def test_the_end_of_a_clusters_time_leaves_nothing(tmp_path, pair, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(result, "write", lambda image, path: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as left:
        run(pair, tmp_path / "out")
    assert left.value.code == 143
    assert not (tmp_path / "out").exists()
    assert signal.getsignal(signal.SIGTERM) == handler


def test_while_results_are_replaced_there_is_no_summary(tmp_path, monkeypatch):
    for name in ("warped.nii.gz", "summary.json"):
        (tmp_path / name).write_text('{"files": ["warped.nii.gz", "summary.json"]}')
    original = os.replace

    def stops(source, target):
        if Path(target).name == "b.nii.gz":
            raise OSError(5, "stopped here")
        original(source, target)

    def replace_all():
        with staged(tmp_path) as staging:
            for name in ("a.nii.gz", "b.nii.gz", "summary.json"):
                (staging / name).write_text("new")

    monkeypatch.setattr(os, "replace", stops)
    with pytest.raises(OSError, match="stopped here"):
        replace_all()
    assert set(visible(tmp_path)) <= {MOVED, "a.nii.gz", "warped.nii.gz"}


def test_a_persons_own_file_is_never_replaced(tmp_path, pair, capsys):
    out = tmp_path / "patient"
    out.mkdir()
    (out / "labels.nii.gz").write_text("drawn by hand")
    assert run(pair, out, "--labels", pair["labels"], "--quiet") == 1
    assert "labels.nii.gz: expected another folder for the results, found a folder where" in capsys.readouterr().err
    assert [path.read_text() for path in out.iterdir()] == ["drawn by hand"]


def test_what_a_kill_left_of_our_results_is_replaced(tmp_path, monkeypatch):
    def replace_all(*names):
        with staged(tmp_path) as staging:
            for name in names:
                (staging / name).write_text(json.dumps({"files": names}))

    def stops(source, target):
        if Path(target).name == "warped.nii.gz":
            raise OSError(5, "stopped here")
        original(source, target)

    replace_all("labels.nii.gz", "warped.nii.gz", "summary.json")
    original = os.replace
    monkeypatch.setattr(os, "replace", stops)
    with pytest.raises(OSError, match="stopped here"):
        replace_all("jacobian.nii.gz", "warped.nii.gz", "summary.json")
    assert {MOVED, "warped.nii.gz"} <= {*visible(tmp_path)} <= {MOVED, "jacobian.nii.gz", "warped.nii.gz"}
    monkeypatch.undo()
    replace_all("warped.nii.gz", "summary.json")
    assert visible(tmp_path) == ["summary.json", "warped.nii.gz"]


def test_images_on_either_side_of_45_degrees_are_not_laid_over_each_other_turned(tmp_path):
    """By 90 degrees, as each one's closest canonical axes would have it."""
    files = [tmp_path / f"{angle}.nii.gz" for angle in (43, 47)]
    for file, angle in zip(files, (43, 47), strict=True):
        save(file, texture((32, 32, 32)), affine(angles=(0, 0, angle)))
    result = registering(*files, network(strength=0), shape=(32, 32, 32), keep_worse=True)
    assert result.summary["similarity"]["before"] > 0.99


def test_a_picture_too_wide_for_nifti_is_refused_before_the_work(tmp_path):
    wide = sitk.Image([40_000, 16], sitk.sitkUInt8)
    with pytest.raises(DataError, match=r"expected sides of at most 32,767, as NIfTI has, found size \(40000, 16\)"):
        registering(wide, wide, network(dim=2), shape=(16, 16))


def test_results_of_another_pair_do_not_stay_beside_the_new_ones(tmp_path, pair):
    assert run(pair, tmp_path / "out", "--labels", pair["labels"], "--quiet") == 0
    for name in ("mine.txt", "mine.nii.gz"):
        (tmp_path / "out" / name).write_text("a person's own")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    there = [*summary["files"], "mine.nii.gz", "disp_/../mine.nii.gz", 3]  # somebody else's summary
    (tmp_path / "out" / "summary.json").write_text(json.dumps(summary | {"files": there}))
    save(tmp_path / "other.nii.gz", texture(MOVING, 7))
    assert run(pair, tmp_path / "out", "--moving", tmp_path / "other.nii.gz", "--quiet") == 0
    new = [name.replace("moving", "other") for name in ALL]
    assert visible(tmp_path / "out") == sorted([*new, "mine.nii.gz", "mine.txt"])


@pytest.mark.parametrize("there", ["[]", "3", '{"files": 3}', '{"files": null}', "{", ""])
def test_a_summary_of_somebody_else_does_not_stop_the_results(tmp_path, there):
    (tmp_path / "summary.json").write_text(there)
    with staged(tmp_path) as staging:
        (staging / "summary.json").write_text("new")
    assert (tmp_path / "summary.json").read_text() == "new"


def test_the_room_that_is_looked_for_is_what_the_results_take(tmp_path, pair, monkeypatch):
    """Uncompressed, and without the picture; noise, the worst that gzip can meet, and a grid finer than the images."""
    asked = []
    monkeypatch.setattr(command, "check_room", lambda folder, size: asked.append(size))
    assert run(pair, tmp_path / "out", "--quiet", grid=(40, 40, 40)) == 0
    taken = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    taken = sum(size for name, size in taken.items() if name not in ("overview.png", "summary.json"))
    assert 0.8 * taken < asked[0] + 20_000 < 1.3 * taken + 20_000


def test_no_result_replaces_an_input(tmp_path, pair, capsys):
    values = pair["labels"].read_bytes()  # it has the name that the warped labels will have
    assert run(pair, tmp_path, "--labels", pair["labels"]) == 1
    assert "labels.nii.gz: expected another folder for the results" in capsys.readouterr().err
    result = register(pair["fixed"], pair["moving"], network(), shape=GRID, labels=pair["labels"])
    with pytest.raises(DataError, match="another folder"):
        result.save(tmp_path)
    assert pair["labels"].read_bytes() == values
    assert "summary.json" not in visible(tmp_path)


# The command


def test_the_command_registers_and_says_what_came_out(tmp_path, pair, capsys):
    more = ["--io", "2", "--lr", "0.001", "--sigma", "2", "--labels", pair["labels"]]
    assert run(pair, tmp_path / "out", *more, "--fixed-labels", pair["fixed_labels"], "--threads", "1") == 0
    shown = capsys.readouterr()
    assert visible(tmp_path / "out") == sorted([*ALL, "labels.nii.gz"])
    assert "instance optimisation: best of 2 steps" in shown.out
    assert "Dice of label 2: 0." in shown.out
    assert str(tmp_path / "out" / "displacement.nii.gz") in shown.out
    assert "instance optimisation: " in shown.err  # the progress bar
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["instance_optimisation"]["steps"] == 2
    assert summary["network"]["weights"] == str(pair["weights"])
    assert run(pair, tmp_path / "quiet", *more, "--quiet", "--keep-worse") == 0
    assert capsys.readouterr() == ("", "")


def test_pairs_are_registered_again_from_a_start_that_changed(tmp_path, pair, monkeypatch):
    asked, start = [], tmp_path / "s.tfm"

    def register_all(pairs, out, one, options, *, quiet):
        assert quiet
        asked.append(options)
        return 0

    monkeypatch.setattr(command, "register_all", register_all)
    for angle in (0.1, 0.25):
        sitk.WriteTransform(sitk.Euler3DTransform((0, 0, 0), angle, 0, 0), str(start))
        options = ("--pairs", "pairs.csv", "--out", tmp_path, "--weights", pair["weights"], "--start", start, "--quiet")
        assert main([*map(str, options)]) == 0
    first, second = asked
    assert first["start"] != second["start"]
    assert first["weights"] == second["weights"]


def test_the_command_prints_doubts_as_notes(tmp_path, pair, capsys):
    for name in ("fixed", "moving"):
        with_codes(pair[name], np.asanyarray(nibabel.load(pair[name]).dataobj), None, 0, None, 0)
    assert run(pair, tmp_path / "out", "--keep-worse") == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 2
    assert all("states no orientation" in note for note in notes)


def test_no_sides_of_the_patient_are_invented_for_a_picture(tmp_path):
    """Nor where it is joined to a volume, for the other image is a slice of one."""
    values = np.random.default_rng(0).random((24, 28))
    sitk.WriteImage(sitk.GetImageFromArray((255 * values).astype(np.uint8)), str(tmp_path / "a.png"))
    with_codes(tmp_path / "b.nii", values[..., None].astype(np.float32), None, 0, None, 0)
    with pytest.warns(UserWarning, match="states no orientation"):
        found = register(tmp_path / "a.png", tmp_path / "b.nii", network(2), shape=(24, 28), progress=False)
    assert found.pair.affine is None


def test_the_official_weights_are_asked_for_by_name(tmp_path, pair, monkeypatch):
    monkeypatch.setattr(weights, "official", lambda name: {"multigradicon": pair["weights"]}[name])
    assert run(pair, tmp_path / "out", "--weights", "multigradicon", "--quiet") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["network"]["weights"] == "multigradicon"
    assert summary["network"]["down"] == [4, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--io", "many"], "argument --io: invalid int value: 'many'"),
        (["--io", "-1"], "error: --io: expected at least 0, got -1"),
        (["--threads", "-1"], "error: --threads: expected at least 0, got -1"),
        (["--threads", "1025"], "error: --threads: expected below 1025, got 1025"),
        (["--sigma", "1e9"], "error: --sigma: expected below 1000, got 1000000000.0"),
        (["--modality", "us"], "argument --modality: invalid choice: 'us'"),
        (["--moving-modality", "us"], "argument --moving-modality: invalid choice: 'us'"),
        (["--shape", "-3"], "error: --shape: expected at least 16, got -3"),
        (["--sigma", "0", "--lmbda", "-1"], "\n--sigma: expected at least 0.5, got 0.0"),
    ],
)
def test_wrong_arguments_exit_with_2(tmp_path, pair, capsys, options, message):
    with pytest.raises(SystemExit) as left:
        run(pair, tmp_path / "out", *options)
    assert left.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_commands_options_help_and_defaults_are_those_of_the_parameters(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, field in Register.model_fields.items():
        default = f" (default: {field.default})" if field.default not in ("", []) else ""
        assert re.search(rf"--{name.replace('_', '-')} (\S.*? )?{re.escape(field.description + default)}", shown), name


@pytest.mark.parametrize("similarity", ["lncc2", "mind"])
def test_another_similarity_without_instance_optimisation_is_told(pair, similarity):
    files = [pair[role] for role in ("fixed", "moving", "weights")]
    how = {"shape": GRID, "lr": 0.001}
    told = f"{similarity} without --io leaves the network's map as it is, and LNCC no longer judges it"
    with pytest.warns(UserWarning, match=told):
        found = register(*files, similarity=similarity, **how)
    assert found.summary["notes"][-1] == told
    assert torch.equal(found.phi.map, register(*files, **how).phi.map)
    with warnings.catch_warnings(action="error"):
        assert not any(told in note for note in register(*files, similarity=similarity, io=1, **how).summary["notes"])


def test_an_option_of_the_command_reaches_register(tmp_path, pair, monkeypatch):
    asked = {}

    def records(**given):
        asked.update(given)
        raise DataError("seen")

    monkeypatch.setattr(command, "register", records)
    options = {"io": 3, "lr": 0.5, "lmbda": 2.0, "sigma": 4.0, "similarity": "mind", "seed": 7}
    options |= {"modality": "ct", "moving_modality": "mr", "start": "rigid"}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert run(pair, tmp_path / "out", *flags, "--quiet") == 1
    assert {name: asked[name] for name in Registering.model_fields} == options | {
        "shape": list(GRID),
        "keep_worse": False,
    }
    assert asked["progress"] is False


def test_the_report_writes_percentages_as_people_do():
    """All of a small grid folded was "1e+02 % folded"."""
    summary = {"similarity": {"before": 0.5, "after": 0.6}, "sdlogj": 0.1, "seconds": 1.0, "files": []}
    summary["verdict"] = {"verdict": "fine", "reason": ""}
    for folded, written in ((100.0, "100 % folded"), (0.0212, "0.021 % folded"), (0.00001, "0.00001 % folded")):
        assert f"-> 0.600, {written}, SDlogJ" in report(summary | {"folding_percent": folded}, "out")


def test_the_package_has_the_function_and_the_module_runs(tmp_path):
    assert fmsam_lib.register is registering
    assert callable(fmsam_lib.register)
    arguments = [
        sys.executable,
        "-m",
        "fmsam_lib.registration.command",
        "--fixed",
        "a.nii.gz",
        "--moving",
        "b.nii.gz",
        "--out",
        "o",
    ]
    done = subprocess.run([*arguments, "--weights", "gone.pt"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "a.nii.gz" in done.stderr
    assert done.stderr.count("\n") == 1


# Real images


def test_real_images(tmp_path, real_data):
    folder = real_data / "HippocampusMR"
    names = {"fixed": "hippocampus_311", "moving": "hippocampus_394"}
    images = {key: folder / "imagesTr" / f"{name}.nii.gz" for key, name in names.items()}
    labels = {key: folder / "labelsTr" / f"{name}.nii.gz" for key, name in names.items()}
    torch.manual_seed(0)
    net = GradICON(3, down=(8, 16), levels=2, last_step=False)
    result = register(
        *images.values(), net, shape=(24, 32, 24), io=25, lr=3e-3, sigma=3.0,
        labels=labels["moving"], fixed_labels=labels["fixed"], progress=False,
    )  # fmt: skip
    assert result.summary["similarity"]["after"] > result.summary["similarity"]["before"]
    sitk.WriteImage(result.displacement, str(tmp_path / "itk.nii.gz"))
    assert gap(apply_with_itk(images["moving"], images["fixed"], tmp_path / "itk.nii.gz"), xyz(result.warped)) < 1e-3
    theirs = apply_with_itk(labels["moving"], images["fixed"], tmp_path / "itk.nii.gz", sitk.sitkNearestNeighbor)
    after = [result.summary["dice"][n]["after"] for n in ("1", "2")]
    truth = np.asarray(nibabel.load(labels["fixed"]).dataobj)
    np.testing.assert_allclose(overlap(theirs, truth), after, atol=2e-3)
