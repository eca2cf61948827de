"""Paths and planes between bowls and wells, whose every value is known, and between tiny networks that were trained."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from fmsam_lib.checking import ConfigError
from fmsam_lib.flatness import mode_connectivity as module
from fmsam_lib.flatness.landscape import TRAINING, batches_of, loss_of, surface
from fmsam_lib.flatness.mode_connectivity import (
    BEYOND,
    COLUMNS,
    Solutions,
    barrier,
    between,
    mix_buffers,
    path,
    trajectories,
)
from fmsam_lib.flatness.weight_space import TERMS, vector
from fmsam_lib.images.domains import open_domain
from fmsam_lib.model.weights import load
from fmsam_lib.parameters import Between, Train
from fmsam_lib.records import write_csv
from fmsam_lib.training.averages import gather_statistics
from fmsam_lib.training.loop import fit, starting
from fmsam_lib.training.losses import Batch
from tests.conftest import fingerprint

RUN = {"validation": 0} | {
    "train_domain": "brain-mr", "seed": 0, "data": "", "down": [4, 4], "levels": 2, "last_step": False, "batch": 1,
    "lr": 3e-3, "rho": 0.05, "lmbda": 1.5, "sigma": 3.0, "threads": 1,
}  # fmt: skip
SHAPES = {"2-D": [24, 24], "3-D": [16, 16, 16]}


def images_of(batches):
    return [(batch.moving, batch.fixed) for batch in batches]


def settings(folder, **changes) -> Between:
    given = {"baseline": str(folder / "adam" / "seed0"), "treatment": str(folder / "sam" / "seed0"), "out": "run"}
    given |= {"test_domains": ["heart-mr"], "data": "", "pairs": 2, "path_points": 5, "plane_points": 3, "threads": 1}
    return Between(**(given | changes))


def trained(folder, optimizer, **changes):
    run = Train(out=str(folder / optimizer / "seed0"), optimizer=optimizer, **(RUN | {"snapshots": 4} | changes))
    fit(starting(run), open_domain(run.train_domain, shape=tuple(run.shape)), run, progress=False)


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES)
def study(request, tmp_path_factory):
    """The folder of a study of two runs from one start."""
    folder = tmp_path_factory.mktemp("study")
    steps = 12 if len(request.param) == 2 else 4
    for optimizer in ("adam", "sam"):
        trained(folder, optimizer, shape=request.param, steps=steps)
    return folder


@pytest.fixture(scope="module")
def table(study):
    return between(settings(study))


def solutions_of(study):
    folders = [study / name / "seed0" for name in ("adam", "sam")]
    run = module.trained_with(folders[0])
    return run, [starting(run).eval(), *(load(folder / "weights.pt") for folder in folders)]


def of(table, term="total", **where):
    table = table[table.term == term]
    for column, value in where.items():
        table = table[table[column] == value]
    return table


# --- bowls and wells ---


class Point(nn.Module):
    """Some weights and one running statistic of each kind."""

    def __init__(self, *weights, mean=0.0, variance=1.0, count=0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(weights, dtype=torch.float64))
        self.register_buffer("running_mean", torch.tensor([mean], dtype=torch.float64))
        self.register_buffer("running_var", torch.tensor([variance], dtype=torch.float64))
        self.register_buffer("num_batches_tracked", torch.tensor(count))


CURVATURES = np.array([[1.0, 2.0, 3.0], [0.5, 0.0, 4.0], [-1.0, 1.0, 0.25]])


def bowl(w):
    """One for each of the TERMS, `c w^2 / 2`."""
    return 0.5 * CURVATURES[:, : len(w)] @ np.asarray(w) ** 2


def bowls(net):
    return bowl(net.w.detach().numpy())


START, END = Point(1.0, -2.0, 0.5), Point(-1.0, 0.3, 2.0)


@pytest.mark.parametrize(("points", "outside"), [(3, 0), (5, 1), (11, 2), (21, 5)])
def test_a_path_has_the_parabolas_values_at_absolute_places(points, outside):
    table = path(START, END, bowls, points=points)
    a, b = START.w.detach().numpy(), END.w.detach().numpy()
    for i, term in enumerate(TERMS):
        rows = of(table, term)
        expected = np.linspace(-outside / (points - 1), 1 + outside / (points - 1), points + 2 * outside)
        np.testing.assert_allclose(rows.alpha, expected, atol=1e-15)
        assert -BEYOND - 0.5 / points <= rows.alpha.min() <= 0
        np.testing.assert_allclose(rows.value, [bowl(a + t * (b - a))[i] for t in rows.alpha], rtol=1e-12, atol=1e-13)
        assert rows.value[rows.alpha == 0].tolist() == [bowls(START)[i]]  # to the bit
        assert rows.value[rows.alpha == 1].tolist() == [bowls(END)[i]]
    assert set(table.statistics) == {"interpolated"}


def test_a_path_there_is_the_path_back_turned_round():
    there, back = (of(path(*ends, bowls, points=9)) for ends in ((START, END), (END, START)))
    np.testing.assert_allclose(there.value, back.value[::-1], rtol=1e-12)


def wells(net):
    """`(w^2 - 1)^2 + tilt w` for the tilts 0 and 0.2, and a bowl: minima near -1 and 1, a barrier in between."""
    w = net.w.item()
    return np.array([(w**2 - 1) ** 2, (w**2 - 1) ** 2 + 0.2 * w, w**2])


def losses(rows):
    return rows.set_index("alpha").value


def test_the_barrier_of_a_double_well_is_its_height():
    table = path(Point(-1.0), Point(1.0), wells, points=41)
    assert barrier(losses(of(table, "total"))) == (pytest.approx(1.0, rel=1e-12), 0.5)
    tilted = barrier(losses(of(table, "similarity")))  # above the tilted line between the ends
    assert tilted[0] == pytest.approx(1.0, rel=1e-12)
    assert barrier(losses(of(table, "regulariser")))[0] == 0.0  # below the line everywhere
    shuffled = of(table).sample(frac=1, random_state=0)
    assert barrier(losses(shuffled)) == barrier(losses(of(table)))


def test_a_rise_beyond_the_ends_is_no_barrier():
    rows = pd.Series([9.0, 1.0, 1.5, 3.0, 9.0], index=[-0.25, 0.0, 0.5, 1.0, 1.25])
    assert barrier(rows)[0] == 0.0
    rows[0.5] = np.nan
    assert np.isnan(barrier(rows)).all()


# --- BatchNorm's statistics ---


def mixed(corners, shares):
    net = Point(0.0)
    mix_buffers(net, corners, shares)
    return net.running_mean.item(), net.running_var.item(), net.num_batches_tracked.item()


CORNERS = [Point(0.0, mean=m, variance=v, count=c) for m, v, c in [(0.1, 0.3, 7), (0.7, 0.9, 8), (0.4, 0.2, 9)]]


@pytest.mark.parametrize("corner", range(3))
def test_buffers_are_exactly_the_corners_at_a_corner(corner):
    shares = [0.0, 0.0, 0.0]
    shares[corner] = 1.0
    there = CORNERS[corner]
    expected = there.running_mean.item(), there.running_var.item(), there.num_batches_tracked.item()
    assert mixed(CORNERS, shares) == expected


def test_buffers_are_affine_between_the_corners():
    mean, variance, _ = mixed(CORNERS, [0.5, 0.2, 0.3])
    assert mean == pytest.approx(0.5 * 0.1 + 0.2 * 0.7 + 0.3 * 0.4)
    assert variance == pytest.approx(0.5 * 0.3 + 0.2 * 0.9 + 0.3 * 0.2)


def test_a_share_of_one_beside_others_is_no_corner():
    mean, variance, _ = mixed(CORNERS, [1.0, 0.5, -0.5])
    assert mean == pytest.approx(0.1 + 0.5 * 0.7 - 0.5 * 0.4)
    assert variance == pytest.approx(0.3 + 0.5 * 0.9 - 0.5 * 0.2)


def test_beyond_the_corners_means_go_on_but_variances_do_not_fall_below_the_smallest():
    mean, variance, _ = mixed(CORNERS[:2], [1.6, -0.6])  # means and variances all positive
    assert mean == pytest.approx(1.6 * 0.1 - 0.6 * 0.7)  # negative
    assert variance == 0.3
    assert mixed(CORNERS[:2], [-0.6, 1.6])[1] == pytest.approx(-0.6 * 0.3 + 1.6 * 0.9)


def test_counters_are_those_of_the_largest_share():
    assert mixed(CORNERS, [0.2, 0.5, 0.3])[2] == 8
    assert mixed(CORNERS, [-0.2, 0.5, 0.7])[2] == 9


def test_statistics_gathered_anew_are_those_of_the_images_that_come_by(study):
    """Each BatchNorm's input seen by a hook: channel means and unbiased variances, averaged over the batches."""
    run, (net, *_) = solutions_of(study)
    dataset = open_domain("heart-mr", shape=tuple(run.shape))
    pairs = [dataset.test_pair(i) for i in range(3)]
    batches = [Batch(p.moving[None], p.fixed[None], None) for p in pairs[:2]]
    batches.append(Batch(torch.stack([p.moving for p in pairs]), torch.stack([p.fixed for p in pairs]), None))
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    seen = {m: [] for m in norms}

    def look(m, inputs):
        x = inputs[0].double().transpose(0, 1).flatten(1)
        seen[m].append((x.mean(1), x.var(1, correction=1)))

    hooks = [m.register_forward_pre_hook(look) for m in norms]
    with torch.no_grad():
        norms[0].running_mean.fill_(100)  # whatever was there
    norms[-1].momentum = 0.3
    weights = vector(net)
    gather_statistics(net, images_of(batches))
    for hook in hooks:
        hook.remove()
    for m in norms:
        assert len(seen[m]) == 3
        mean, variance = (torch.stack(part).mean(0).float() for part in zip(*seen[m], strict=True))
        torch.testing.assert_close(m.running_mean, mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(m.running_var, variance, rtol=1e-4, atol=1e-6)
        assert m.num_batches_tracked == 3
    assert [m.momentum for m in norms] == [0.1] * (len(norms) - 1) + [0.3]
    assert not any(m.training for m in net.modules())
    assert torch.equal(vector(net), weights)


def test_a_path_ends_on_the_losses_of_both_networks_with_their_own_statistics(study):
    run, (_, *ends) = solutions_of(study)
    batch = batches_of(run, ["heart-mr"], pairs=2)["heart-mr"]
    loss = loss_of(batch, **run.loss())
    before = [fingerprint(net) for net in ends]
    rows = path(*ends, loss, points=5, anew=[batch])
    assert [fingerprint(net) for net in ends] == before
    for alpha, net in enumerate(ends):
        found = rows[(rows.alpha == alpha) & (rows.statistics == "interpolated")]
        assert found.value.tolist() == loss(net).tolist()  # to the bit
        copied = load_like(net)
        gather_statistics(copied, images_of([batch]))
        assert rows[(rows.alpha == alpha) & (rows.statistics == "re-estimated")].value.tolist() == loss(copied).tolist()
        assert loss(copied).tolist() != loss(net).tolist()
    assert len(rows) == (5 + 2) * 2 * len(TERMS)


def load_like(net):
    copied = type(net)(**net.settings)
    copied.load_state_dict(net.state_dict())
    return copied.eval()


def test_a_path_between_networks_of_another_mode_and_layout_is_the_same(study):
    run, (_, *ends) = solutions_of(study)
    batch = batches_of(run, ["heart-mr"], pairs=2)["heart-mr"]
    loss = loss_of(batch, **run.loss())
    expected = path(*ends, loss, points=5, anew=[batch])
    layout = torch.channels_last if len(run.shape) == 2 else torch.channels_last_3d
    others = [net.to(memory_format=layout).train() for net in ends]
    before = [fingerprint(net) for net in others]
    assert path(*others, loss, points=5, anew=[batch]).equals(expected)
    assert [fingerprint(net) for net in others] == before
    assert all(net.training for net in others)


# --- the plane of the solutions ---


def triangle():
    return Solutions(Point(1.0, 1.0, 1.0), Point(4.0, 1.0, 5.0), Point(1.0, 3.0, 2.0))


def test_corners_are_at_their_places():
    """Distances are the weights' own: 5 to the baseline; the treatment lies 0.8 along it and sqrt(4.36) aside."""
    solutions = triangle()
    expected = [(0, 0), (5, 0), (0.8, (4 + 1 - 0.64) ** 0.5)]
    np.testing.assert_allclose(solutions.places, expected, atol=1e-12)
    assert float(solutions.along @ solutions.across) == pytest.approx(0, abs=1e-12)
    assert [float(solutions.along.norm()), float(solutions.across.norm())] == pytest.approx([1, 1])
    for corner, place in zip(solutions.corners, expected, strict=True):
        np.testing.assert_allclose(solutions.place(corner), (*place, 0), atol=1e-7)


def test_what_lies_beside_the_plane_is_told_as_a_share():
    solutions = triangle()
    normal = torch.linalg.cross(solutions.along, solutions.across)
    aside = solutions.origin + 3 * solutions.along + 4 * normal
    np.testing.assert_allclose(solutions.place(aside), (3, 0, 0.8), atol=1e-12)
    np.testing.assert_allclose(solutions.place(solutions.origin - 2 * normal), (0, 0, 1), atol=1e-12)
    assert solutions.place(solutions.origin) == (0, 0, 0)


def test_shares_are_barycentric():
    solutions = triangle()
    for i, place in enumerate(solutions.places):
        np.testing.assert_allclose(solutions.shares(*place), np.eye(3)[i], atol=1e-12)
    corners = np.array([vector(net).numpy() for net in solutions.corners])
    for alpha, beta in np.random.default_rng(0).normal(size=(5, 2)):
        shares = solutions.shares(alpha, beta)
        assert sum(shares) == pytest.approx(1)
        there = solutions.origin + alpha * solutions.along + beta * solutions.across
        np.testing.assert_allclose(shares @ corners, there, rtol=1e-12)


@pytest.mark.parametrize("sides", [(3, 3), (5, 4)])
def test_every_value_of_the_plane_is_in_its_place(sides):
    solutions = triangle()
    alphas, betas = np.linspace(-1, 6, sides[0]), np.linspace(-0.5, 3, sides[1])
    table = surface(solutions.at, bowls, alphas, betas)
    for i, term in enumerate(TERMS):
        rows = of(table, term)
        assert rows.alpha.tolist() == alphas.tolist() * sides[1]
        assert rows.beta.tolist() == np.repeat(betas, sides[0]).tolist()
        w = [solutions.origin + a * solutions.along + b * solutions.across for b in betas for a in alphas]
        np.testing.assert_allclose(rows.value, [bowl(there.numpy())[i] for there in w], rtol=1e-12, atol=1e-12)


def test_the_planes_start_is_exact_and_its_corners_are_the_solutions(study):
    run, nets = solutions_of(study)
    loss = loss_of(batches_of(run, ["heart-mr"], pairs=2)["heart-mr"], **run.loss())
    solutions = Solutions(*nets)
    for net, (alpha, beta) in zip(nets, solutions.places, strict=True):
        values = surface(solutions.at, loss, np.array([alpha]), np.array([beta])).value.tolist()
        if net is nets[0]:
            assert values == loss(net).tolist()
        np.testing.assert_allclose(values, loss(net), rtol=2e-4, atol=1e-7)
    assert abs(loss(nets[1])[0] - loss(nets[2])[0]) > 1e-3 * loss(nets[1])[0]


def on_one_line(*steps):
    return [Point(1.0 + step, 2.0 - 3 * step, 0.5) for step in steps]


@pytest.mark.parametrize("steps", [(0, 1, 1), (0, 1, 2), (0, 0, 1), (0, 1, 0), (0, 1, -1)], ids=str)
def test_three_networks_on_one_line_are_refused(steps):
    with pytest.raises(ValueError, match="got three networks on one line: is a run given twice"):
        Solutions(*on_one_line(*steps))


@pytest.mark.parametrize("axis", ["alpha", "beta"])
def test_the_plane_shows_all_places_and_a_fifth_more(table, axis):
    low, high = table[table.kind == "trajectory"][axis].agg(["min", "max"])
    shown = table[table.kind == "plane"][axis].agg(["min", "max"]).tolist()
    assert shown == pytest.approx([low - 0.2 * (high - low), high + 0.2 * (high - low)])


# --- trajectories ---


def test_trajectories_pass_through_the_snapshots(tmp_path):
    solutions = triangle()
    (tmp_path / "a" / "snapshots").mkdir(parents=True)
    halfway = solutions.origin + 2.0 * solutions.along + 0.5 * solutions.across
    torch.save(halfway, tmp_path / "a" / "snapshots" / "step000500.pt")
    (tmp_path / "a" / "snapshots" / ".step000700.pt.12.partial").write_bytes(b"half")
    table = trajectories(solutions, [("adam", tmp_path / "a", 1000), ("sam", tmp_path / "none", 2000)])
    assert table[["optimizer", "step"]].to_numpy().tolist() == [
        ["adam", 0], ["adam", 500], ["adam", 1000], ["sam", 0], ["sam", 2000]
    ]  # fmt: skip
    expected = [(0, 0), (2, 0.5), solutions.places[1], (0, 0), solutions.places[2]]
    np.testing.assert_allclose(table[["alpha", "beta"]], expected, atol=1e-12)
    np.testing.assert_allclose(table.value, 0, atol=1e-7)
    assert set(table.kind) == {"trajectory"}


def test_trajectories_of_trainings_begin_at_the_start_and_end_at_the_solutions(study, table):
    run, nets = solutions_of(study)
    solutions = Solutions(*nets)
    ways = table[table.kind == "trajectory"]
    expected = {round(run.steps * i / 4) for i in range(5)}
    for i, (name, way) in enumerate(ways.groupby("optimizer"), start=1):
        assert name == ("adam", "sam")[i - 1]
        assert way.step.tolist() == sorted(expected)
        np.testing.assert_allclose(way[["alpha", "beta"]].iloc[[0, -1]], [(0, 0), solutions.places[i]], atol=1e-6)
        np.testing.assert_allclose(way.value.iloc[[0, -1]], 0, atol=1e-6)
        assert way.value.iloc[1:-1].between(0.01, 1).all()  # trainings do not keep to a plane
        distances = np.hypot(way.alpha, way.beta) / np.sqrt(1 - way.value**2)
        for step, distance in zip(way.step.iloc[1:], distances.iloc[1:], strict=True):
            snapshot = torch.load(study / name / "seed0" / "snapshots" / f"step{int(step):06d}.pt", weights_only=True)
            assert distance == pytest.approx((snapshot - vector(nets[0])).norm().item(), rel=1e-4)


# --- everything together ---


def test_between_measures_the_path_and_the_plane_on_every_domain(study, table):
    run, nets = solutions_of(study)
    batches = batches_of(run, ["heart-mr"], pairs=2)
    assert set(table.columns) <= set(COLUMNS)
    assert table[COLUMNS[:1] + COLUMNS[2:5]].drop_duplicates().to_numpy().tolist() == [["brain-mr", "adam", "sam", 0]]
    assert table.groupby("kind").size().to_dict() == {
        "path": 2 * (5 + 2) * 2 * len(TERMS), "plane": 2 * 9 * len(TERMS), "trajectory": 10
    }  # fmt: skip
    for domain in (TRAINING, "heart-mr"):
        loss = loss_of(batches[domain], **run.loss())
        for alpha, net in enumerate(nets[1:]):
            ends = table[(table.kind == "path") & (table.test_domain == domain) & (table.alpha == alpha)]
            assert ends[ends.statistics == "interpolated"].value.tolist() == loss(net).tolist()
            copied = load_like(net)
            gather_statistics(copied, images_of([batches[TRAINING]]))  # never from the images of a test domain
            assert ends[ends.statistics == "re-estimated"].value.tolist() == loss(copied).tolist()
        plane = of(table, kind="plane", test_domain=domain)
        ways = table[table.kind == "trajectory"]
        for axis in ("alpha", "beta"):
            margin = 0.2 * (ways[axis].max() - ways[axis].min())
            assert plane[axis].min() == pytest.approx(ways[axis].min() - margin)
            assert plane[axis].max() == pytest.approx(ways[axis].max() + margin)
    assert np.isfinite(table.value).all()


def test_between_twice_is_the_same_and_reads_back_with_all_columns(study, table, tmp_path):
    assert between(settings(study)).equals(table)
    write_csv(table, tmp_path / "between.csv", COLUMNS)
    read = pd.read_csv(tmp_path / "between.csv")
    assert list(read.columns) == COLUMNS
    np.testing.assert_array_equal(read.value, table.value)
    assert [file.name for file in tmp_path.iterdir()] == ["between.csv"]


@pytest.fixture
def copied(study, tmp_path):
    """A study of one's own to change."""
    return shutil.copytree(study, tmp_path / "study")


def edit(folder, **changes):
    config = folder / "config.json"
    record = json.loads(config.read_text())
    config.write_text(json.dumps(record | {"parameters": record["parameters"] | changes}))


def test_without_snapshots_there_are_start_and_end(copied):
    shutil.rmtree(copied / "adam" / "seed0" / "snapshots")
    table = between(settings(copied, path_points=3))
    ways = table[table.kind == "trajectory"].groupby("optimizer").size()
    assert ways.to_dict() == {"adam": 2, "sam": 5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"from one start with one loss, got\n- seed: 0 and 1$"),
        ({"lmbda": 2.0, "similarity": "mind"}, r"got\n- similarity: 'lncc' and 'mind'\n- lmbda: 1\.5 and 2\.0$"),
        ({"train_domain": "heart-mr"}, r"- train_domain: 'brain-mr' and 'heart-mr'$"),
        ({"weights": "unigradicon"}, r"- weights: '' and 'unigradicon'$"),
    ],
    ids=str,
)
def test_runs_of_other_starts_or_losses_are_refused_by_name(copied, changes, message):
    edit(copied / "sam" / "seed0", **changes)
    with pytest.raises(ConfigError, match=message):
        between(settings(copied))


def test_first_weights_that_are_not_those_of_the_training_are_refused(copied):
    config = copied / "sam/seed0/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"start": "another"}))
    with pytest.raises(ConfigError, match=r"got\n- first weights \(hash\): another there, \w{12} now$"):
        between(settings(copied))


def test_runs_that_cannot_be_told_apart_are_refused(copied):
    other = shutil.copytree(copied / "sam", copied / "other" / "adam")
    with pytest.raises(ConfigError, match=r"folders that tell them apart, <name>/seed<seed>, got .*adam/seed0"):
        between(settings(copied, treatment=str(other / "seed0")))


def test_the_same_run_twice_is_refused(study):
    once = settings(study)
    with pytest.raises(ValueError, match="is a run given twice"):
        between(once.model_copy(update={"treatment": once.baseline}))


def test_a_run_that_is_not_there_is_named(study):
    with pytest.raises(ConfigError, match=r"expected a run of notebook 10_train in .*none"):
        between(settings(study, treatment=str(study / "none")))
