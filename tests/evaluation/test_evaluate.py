import dataclasses
import json
import re
import sys
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch

from fmsam_lib.checking import ConfigError, read
from fmsam_lib.evaluation import evaluate as evaluating
from fmsam_lib.evaluation.corruptions import CORRUPTIONS
from fmsam_lib.evaluation.evaluate import COLUMNS, CURVES, PAIRS, ROWS, evaluate, evaluate_all, read_results
from fmsam_lib.images.domains import open_domain
from fmsam_lib.metrics import measure
from fmsam_lib.model.network import GradICON
from fmsam_lib.model.spatial import identity_map
from fmsam_lib.parameters import Evaluate, Train
from fmsam_lib.records import DataError, write_csv


def net():
    torch.manual_seed(0)
    return GradICON(2, down=(4, 4), levels=2, last_step=False).eval()


def measured(method, domain="brain-mr", **options):
    dataset = open_domain(domain, shape=(24, 24)) if isinstance(domain, str) else domain
    return evaluating.measured(method, dataset, progress=False, **{"pairs": 2} | options)


def test_an_untrained_network_changes_nothing():
    dataset = open_domain("heart-mr", shape=(32, 32))
    none, identity = (evaluate(n, dataset, pairs=3) for n in (None, net()))
    for metric in ("dice", "hd95", "tre"):
        a, b = (rows[rows.metric == metric].value.to_numpy() for rows in (none, identity))
        np.testing.assert_allclose(a, b, atol=1e-4)
        assert len(a) >= 3
    assert (identity[identity.metric == "folding_percent"].value == 0).all()
    assert (identity[identity.metric == "inverse_error"].value < 1e-5).all()
    assert not (none.metric == "inverse_error").any()  # there is no map


def test_it_is_the_map_of_moving_onto_fixed_that_is_measured():
    wild = net()
    with torch.no_grad():
        for p in wild.parameters():
            p.add_(0.3 * torch.randn_like(p))
        pair = open_domain("brain-mr", shape=(24, 24)).test_pair(0)
        there, back = (wild(a[None], b[None]).map for a, b in ((pair.moving, pair.fixed), (pair.fixed, pair.moving)))
    rows = measured(wild, pairs=1).results.query("label == ''")
    found, other = (
        {row["metric"]: row["value"] for row in measure(pair, *maps)} for maps in ((there, back), (back, there))
    )
    assert {name: found[name] for name in rows.metric} == dict(zip(rows.metric, rows.value, strict=True))
    assert abs(found["map_error"] - other["map_error"]) > 0.01


def test_twice_the_same_to_the_bit_but_for_what_it_took():
    first, second = (measured(net()) for _ in range(2))
    pd.testing.assert_frame_equal(first.results, second.results, check_exact=True)
    assert "seconds" not in set(first.results.metric)
    assert first.costs[["metric", "unit"]].values.tolist() == [["seconds", "s"]] * 2
    assert first.costs.value.min() > 0


def test_no_registration_costs_nothing():
    assert measured(None).costs.empty


def test_results_are_read_back_as_they_were(tmp_path):
    rows = measured(None).results.assign(train_domain="", optimizer="none", seed=None)
    write_csv(rows, tmp_path / "results.csv", COLUMNS)
    back = read_results(tmp_path / "results.csv")
    assert list(back.columns) == COLUMNS
    assert back.value.tolist() == rows.value.tolist()  # to the bit
    assert back.seed.isna().all()
    assert (back.train_domain == "").all()
    first = (tmp_path / "results.csv").read_bytes()
    write_csv(back, tmp_path / "results.csv", COLUMNS)
    assert (tmp_path / "results.csv").read_bytes() == first


class Broken:
    """Two test pairs, of which the first cannot be read."""

    name, test_count = "broken", 2

    def test_pair(self, index):
        if index == 0:
            raise DataError("a.nii.gz: expected a NIfTI file, found 3 bytes. Copy it anew.")
        return open_domain("brain-mr", shape=(24, 24)).test_pair(index)


def test_one_bad_file_does_not_lose_the_others():
    rows, costs, _, problems = measured(net(), Broken())
    assert problems == ["a.nii.gz: expected a NIfTI file, found 3 bytes. Copy it anew."]
    assert rows.pair.nunique() == costs.pair.nunique() == 1


@pytest.mark.parametrize("side", [0, 1])
def test_a_map_or_inverse_that_is_not_finite_is_a_problem_not_a_perfect_score(side):
    def broken(pair):
        maps = [identity_map(tuple(pair.fixed.shape[1:])).clone() for _ in range(2)]
        maps[side][0, 0, 3, 3] = float("nan")
        return tuple(maps)

    rows, costs, pairs, problems = measured(broken)
    assert pairs.empty
    assert rows.empty
    assert costs.empty
    assert len(problems) == 2
    assert "not finite" in problems[0]


class Nan(GradICON):
    """A network whose training went wrong."""

    def forward(self, moving, fixed):
        phi = super().forward(moving, fixed)
        return phi.then(torch.full_like(phi.displacements[-1], float("nan")))


def test_a_network_whose_maps_are_not_finite_is_a_problem():
    rows, _, _, problems = measured(Nan(2, down=(4, 4), levels=1, last_step=False).eval())
    assert rows.empty
    assert [problem.partition(":")[2] for problem in problems] == [" left out, the map found is not finite"] * 2


def test_a_method_that_gives_up_on_one_pair_goes_on_with_the_next():
    calls = []

    def moody(pair):
        calls.append(pair.name)
        if len(calls) == 1:
            raise ValueError("expected a finite loss")
        return identity_map(tuple(pair.fixed.shape[1:])), None

    rows, _, _, problems = measured(moody)
    assert problems == [f"brain-mr, {calls[0]}: left out, expected a finite loss"]
    assert rows.pair.unique().tolist() == calls[1:]


@pytest.mark.parametrize("shape", [(24, 20), (16, 20, 24)])
def test_fields_are_learn2regs(tmp_path, shape):
    """A shift by 2 and 1 samples: 2 and 1 in the file, in voxels, beside the fixed grid's affine."""
    dataset = open_domain("brain-mr", shape=shape)
    pair = dataset.test_pair(0)

    def shifted(pair):
        phi = identity_map(shape).clone()
        for axis, samples in ((0, 2.0), (1, 1.0)):
            phi[:, axis] += samples / (shape[axis] - 1)
        return phi, None

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("time.time", lambda: 1e9)  # no clock in the file
        measured(shifted, dataset, pairs=1, fields=tmp_path / "then")
    measured(shifted, dataset, pairs=1, fields=tmp_path / "fields")
    (file,) = (tmp_path / "fields").iterdir()  # nothing else is left there
    assert file.name == f"disp_{'_'.join(pair.name.split('<-'))}.nii.gz"
    assert file.read_bytes() == (tmp_path / "then" / file.name).read_bytes()
    image = nibabel.load(file)
    assert image.shape == (*shape, len(shape))
    np.testing.assert_allclose(image.affine, np.eye(4) if pair.affine is None else pair.affine)
    field = np.asarray(image.dataobj).reshape(-1, len(shape))
    np.testing.assert_allclose(field, [[2.0, 1.0, 0.0][: len(shape)]] * len(field), atol=1e-4)


# --- for scripts ---


def test_from_python_there_are_tidy_rows_and_the_network_stays_as_it_is():
    domain, network = open_domain("brain-mr", shape=(24, 24)), net().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    table = evaluate(network, domain, pairs=2)
    assert list(table.columns) == ROWS
    pd.testing.assert_frame_equal(table, measured(net()).results)  # as in eval mode
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert evaluate(None, domain).pair.nunique() == 10  # unless one asks for another number


def test_images_that_are_not_from_0_to_1_are_a_problem():
    class Raw(type(open_domain("brain-mr", shape=(16, 16)))):
        def test_pair(self, index):
            pair = super().test_pair(index)
            return dataclasses.replace(pair, moving=pair.moving * 255)

    rows, _, _, problems = measured(net(), Raw("brain-mr", (16, 16), 0))
    assert rows.empty
    assert len(problems) == 2
    told = r"brain-mr-0-\d+: expected images in \[0, 1\], got 0 to 2\d\d.*: scale them"
    assert all(re.fullmatch(told, problem) for problem in problems), problems


def test_problems_are_warnings_and_nothing_measured_is_an_error():
    with pytest.warns(UserWarning, match=r"a.nii.gz: expected a NIfTI file"):
        table = evaluate(net(), Broken(), pairs=2)
    assert table.pair.nunique() == 1
    with pytest.raises(DataError, match=r"no test pair could be measured:\n- b.nii.gz: cut short"):
        evaluate(None, Unread())


class Named:
    """Two pairs of one file name, whose manifest names the subjects."""

    name, test_count = "named", 2

    def test_pair(self, index):
        pair = open_domain("brain-mr", shape=(24, 24)).test_pair(index)
        object.__setattr__(pair, "subjects", ("s1", "s2") if index else ("s1", "s1"))
        return pair


def test_the_subjects_that_a_manifest_names_stand_beside_the_results(monkeypatch):
    monkeypatch.setattr("fmsam_lib.evaluation.evaluate.open_domain", lambda name, **how: Named())
    tables, _ = evaluate_all(settings(pairs=2, test_domains=["named"]), progress=False)
    assert list(tables["pairs"].columns) == PAIRS
    assert tables["pairs"].test_domain.tolist() == ["named"] * 2
    assert tables["pairs"].subjects.tolist() == ["s1|s1", "s1|s2"]
    assert list(tables["results"].columns) == COLUMNS


def test_pairs_of_several_methods_are_named_once(run):
    tables, _ = evaluate_all(settings(run=run, methods=["none", "network"]), progress=False)
    assert tables["pairs"].values.tolist() == [["brain-mr", tables["results"].pair[0], ""]]


# --- all methods of a notebook's settings ---


def settings(**changes):
    values = {
        "run": "",
        "out": "run",
        "methods": ["none"],
        "test_domains": ["brain-mr"],
        "shape": [24, 24],
        "data": "",
        "pairs": 1,
        "io": 2,
        "io_lr": 0.001,
        "alone_io": 2,
        "alone_lr": 0.003,
        "corruptions": [],
        "corrupted_pairs": 2,
        "fields": False,
        "threads": 1,
    }
    return read(Evaluate, values | changes)


@pytest.fixture
def run(tmp_path):
    """The folder of a training whose network is still the identity."""
    values = {
        "out": str(tmp_path),
        "train_domain": "brain-mr",
        "optimizer": "sam",
        "seed": 3,
        "shape": [24, 24],
        "data": "",
        "down": [4, 4],
        "levels": 2,
        "last_step": False,
        "steps": 1,
        "batch": 1,
        "lr": 0.001,
        "rho": 0.01,
        "sigma": 2.0,
        "lmbda": 1.0,
        "threads": 1,
        "validation": 0,
    }
    (tmp_path / "config.json").write_text(json.dumps({"parameters": Train(**values).model_dump()}))
    net().save(tmp_path / "weights.pt")
    return str(tmp_path)


def test_every_method_has_its_name_and_its_training(run):
    tables, problems = evaluate_all(settings(run=run, methods=["none", "io", "network", "network+io"]), progress=False)
    assert problems == []
    names = tables["results"][["optimizer", "train_domain", "seed"]].drop_duplicates().fillna(-1)
    assert names.values.tolist() == [
        ["none", "", -1],
        ["io", "", -1],
        ["sam", "brain-mr", 3],
        ["sam+io", "brain-mr", 3],
    ]
    with_map = tables["results"].query("metric == 'inverse_error'").optimizer
    assert with_map.tolist() == ["io", "sam", "sam+io"]
    assert tables["costs"].query("metric == 'seconds'").optimizer.tolist() == ["io", "sam", "sam+io"]


def test_averaged_weights_and_statistics_of_the_test_images_are_methods(run):
    wanted = ["network", "network+ema", "network+tail", "network+bn"]
    with pytest.raises(ConfigError, match=r"averages: true for network\+ema"):
        evaluate_all(settings(run=run, methods=wanted), progress=False)
    config = json.loads((Path(run) / "config.json").read_text())
    config["parameters"]["averages"] = True
    (Path(run) / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match=r"expected weights_ema.pt in .*, got none: delete weights.pt and train again"
    ):
        evaluate_all(settings(run=run, methods=wanted), progress=False)
    for number, file in enumerate(("weights", "weights_ema", "weights_tail")):
        moved, generator = net(), torch.Generator().manual_seed(number)
        for p in moved.parameters():
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
        moved.save(Path(run) / f"{file}.pt")
    results = evaluate_all(settings(run=run, methods=wanted), progress=False)[0]["results"]
    errors = results[results.metric == "inverse_error"].set_index("optimizer").value
    assert [*errors.index] == ["sam", "sam+ema", "sam+tail", "sam+bn"]
    assert errors.nunique() == 4
    assert set(results.seed) == {3}


def test_statistics_of_the_test_images_come_from_batches_of_nearly_one_size(monkeypatch):
    """Batches count alike, so of 9 pairs in 8 and 1 the last pair would count as much as the others together."""
    sizes = []
    monkeypatch.setattr(
        evaluating, "gather_statistics", lambda net, pairs: sizes.extend(len(moving) for moving, _ in pairs)
    )
    evaluating._gathered(net(), open_domain("brain-mr", shape=(16, 16)), 9)
    assert sorted(sizes) == [4, 5]


def test_instance_optimisation_costs_more_than_the_network_alone(run):
    given = settings(run=run, methods=["network", "network+io"], io=20)
    seconds = evaluate_all(given, progress=False)[0]["costs"].query("metric == 'seconds'").set_index("optimizer").value
    assert seconds["sam+io"] > 3 * seconds["sam"]


def test_only_the_network_and_no_registration_are_corrupted(run):
    given = settings(run=run, methods=["none", "io", "network"], corruptions=["noise"], pairs=1, corrupted_pairs=1)
    curves = evaluate_all(given, progress=False)[0]["robustness"]
    assert set(curves.optimizer) == {"none", "sam"}
    assert set(curves.corruption) == {"noise"}
    assert set(curves.severity) == {0.0, *CORRUPTIONS["noise"].severities}
    none = curves.query("optimizer == 'none' and metric == 'dice'").value
    assert none.nunique() == 1  # noise moves nothing
    assert not evaluate_all(settings(), progress=False)[0]["robustness"].columns.difference(CURVES).any()


def test_fields_of_every_method_and_domain_have_a_folder(run, tmp_path):
    evaluate_all(settings(run=run, out=str(tmp_path), methods=["none", "network"], fields=True), progress=False)
    assert [p.parent.name for p in tmp_path.glob("fields/*/*/*")] == ["brain-mr"]
    assert [p.name for p in tmp_path.glob("fields/*")] == ["sam"]


def test_a_domain_that_is_not_there_is_a_problem_not_the_end(tmp_path):
    given = settings(test_domains=["NoSuchSet", "brain-mr"], data=str(tmp_path))
    tables, problems = evaluate_all(given, progress=False)
    assert set(tables["results"].test_domain) == {"brain-mr"}
    assert len(problems) == 1
    assert "NoSuchSet" in problems[0]
    with pytest.raises(DataError, match="no test pair could be measured"):
        evaluate_all(settings(test_domains=["NoSuchSet"], data=str(tmp_path)), progress=False)


def test_nothing_measured_on_one_domain_leaves_the_numbers_numbers(monkeypatch):
    real = open_domain
    monkeypatch.setattr(
        "fmsam_lib.evaluation.evaluate.open_domain", lambda name, **how: Unread() if name == "x" else real(name, **how)
    )
    tables, problems = evaluate_all(settings(test_domains=["x", "brain-mr"]), progress=False)
    assert tables["results"].value.dtype == float
    assert problems == ["b.nii.gz: cut short"]


class Unread:
    name, test_count = "x", 1

    def test_pair(self, index):
        raise DataError("b.nii.gz: cut short")


@pytest.mark.parametrize("methods", [["network"], ["none", "io"], ["network+io"]])
def test_a_method_that_needs_a_run_is_refused_without_one(methods):
    with pytest.raises(
        ConfigError, match=f"expected run, the folder of a training, .* {methods[-1]}".replace("+", r"\+")
    ):
        settings(methods=methods)


@pytest.mark.parametrize(("method", "steps"), [("io", "alone_io"), ("network+io", "io")])
def test_optimisation_without_a_step_is_refused(method, steps):
    with pytest.raises(ConfigError, match=f"expected {steps} of at least 1 step"):
        settings(run="there", methods=[method], **{steps: 0})


def test_a_run_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="expected a run of notebook 10_train"):
        evaluate_all(settings(run=str(tmp_path / "none"), methods=["none", "network"]), progress=False)


def test_without_ants_its_absence_is_named_and_the_others_go_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "ants", None)  # an import of it fails
    tables, problems = evaluate_all(settings(methods=["ants-syn", "none"]), progress=False)
    assert set(tables["results"].optimizer) == {"none"}
    assert len(problems) == 1
    assert "expected antspyx for ants-syn" in problems[0]
    with pytest.raises(DataError, match="expected antspyx"):
        evaluate_all(settings(methods=["ants-syn"]), progress=False)


def test_a_name_is_no_domain():
    with pytest.raises(ConfigError, match=r"expected a domain, got 'brain-mr': fm.open_domain"):
        evaluate(None, "brain-mr")


@pytest.mark.parametrize("found", [torch.rand(1, 2, 16, 16), None, (np.zeros(3), None), (torch.rand(1, 2, 16, 16), 3)])
def test_a_method_that_returns_no_maps_is_refused(found):
    with pytest.raises(ConfigError, match=r"expected a method to return tensors \(map, inverse or None\), got "):
        evaluate(lambda pair: found, open_domain("brain-mr", shape=(16, 16)), pairs=1)


def test_a_map_of_another_shape_is_left_out_and_the_others_stay():
    shapes = iter([(16, 16), (16, 15)])
    with pytest.warns(UserWarning, match=r"left out, .*expected phi_map of shape \(1, 2, 16, 16\)"):
        table = evaluate(
            lambda pair: (identity_map(next(shapes)), None), open_domain("brain-mr", shape=(16, 16)), pairs=2
        )
    assert table.pair.nunique() == 1


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.int64])
def test_maps_of_any_type_will_do(kind):
    domain, grid = open_domain("brain-mr", shape=(16, 16)), identity_map((16, 16))
    table = evaluate(lambda pair: (grid.to(kind), grid), domain, pairs=1)
    assert table.equals(evaluate(lambda pair: (grid.to(kind).float(), grid), domain, pairs=1))


def test_a_wrapped_network_is_the_network_and_another_module_is_told():
    domain, own = open_domain("brain-mr", shape=(24, 24)), net()
    for wrapped in (torch.compile(own, backend="eager"), torch.nn.DataParallel(own)):
        assert evaluate(wrapped, domain, pairs=1).equals(evaluate(own, domain, pairs=1))

    class Other(torch.nn.Module):
        def forward(self, moving, fixed):
            return own(moving, fixed).map

    other = Other()
    with pytest.raises(ConfigError, match=r"expected a GradICON, or a method that takes a Pair, got .*'fixed': lambda"):
        evaluate(other, domain, pairs=1)
    table = evaluate(lambda pair: (other(pair.moving[None], pair.fixed[None]), None), domain, pairs=1)
    assert len(table)


def test_a_grid_that_the_network_does_not_know_is_told():
    own = net()
    with warnings.catch_warnings(action="error"):
        evaluate(own, open_domain("brain-mr", shape=(48, 48)), pairs=1)  # it was trained on none
        own.shape = (32, 32)
        evaluate(own, open_domain("brain-mr", shape=(48, 24)), pairs=1)
    told = r"trained on \(32, 32\) samples: brain-mr has \(32, 49\), where Dice may be .* open it with shape=net.shape"
    with pytest.warns(UserWarning, match=told):
        evaluate(own, open_domain("brain-mr", shape=(32, 49)), pairs=1)
    with pytest.raises(ConfigError, match="expected a 3-D network for brain-mr, got a 2-D one"):
        evaluate(own, open_domain("brain-mr", shape=(16, 16, 16)), pairs=1)


def test_a_network_of_another_type_than_the_images_is_told():
    with pytest.raises(DataError, match=r"expected torch.float64 as in the weights, got torch.float32.*net.float"):
        evaluate(net().double(), open_domain("brain-mr", shape=(24, 24)), pairs=1)
    half = net().bfloat16()
    half.precision = "bf16"  # which computes in it whatever comes
    assert len(evaluate(half, open_domain("brain-mr", shape=(24, 24)), pairs=1))


def test_labels_that_are_named_and_nowhere_are_a_warning():
    domain = open_domain("brain-mr", shape=(16, 16))
    pair = dataclasses.replace(domain.test_pair(0), fixed_label=None, moving_label=None)
    domain.test_pair = lambda index: pair
    with pytest.warns(UserWarning, match="brain-mr: expected the labels it names, got none, so no Dice"):
        evaluate(None, domain, pairs=1)
    domain.labels = {}
    with warnings.catch_warnings(action="error"):
        evaluate(None, domain, pairs=1)


def test_a_path_is_no_network():
    with pytest.raises(ConfigError, match=r"expected a network, another method or None, got 'runs/quick'"):
        evaluate("runs/quick", open_domain("brain-mr", shape=(16, 16)))
