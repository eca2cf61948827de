"""A study on a cluster: Snakemake's executors and stand-ins for scheduler and Kubernetes; profiles and resources."""

import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from fmsam_lib.checking import ConfigError
from fmsam_lib.study.file import read_study
from fmsam_lib.study.grid import NotebookName
from fmsam_lib.study.notebooks import NOTEBOOKS, jobs
from fmsam_lib.study.run import main
from tests.conftest import PROJECT
from tests.study.kubernetes_api import Cluster, container_of
from tests.study.test_faults import results
from tests.study.test_replanning import Checkout
from tests.study.test_sweeps import STUDY

SCHEDULER = PROJECT / "tests/study/scheduler.py"
TINY = STUDY | {
    **{"optimizers": ["sam"], "test_domains": ["brain-mr"], "evaluate": {"pairs": 2, "corruptions": []}},
    "train": {"down": [4, 8], "levels": 2, "steps": 400, "batch": 1, "validation": 0, "rho": [0.01, 0.02]},
}


# --- resources


def resources_of(tmp_path, **changes):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(STUDY | changes))
    return {job.name: job.resources for job in jobs(read_study(tmp_path / "s.yaml"), tmp_path, "", tmp_path)}


def test_resources_are_the_notebooks_own_or_what_its_section_needs(tmp_path):
    train = {"steps": 10, "batch": 4, "processes": [2, 4], "threads": 3, "device": "cuda"}
    given = {"20_evaluate": {"cpus": 5, "gpus": 1, "minutes": 20}, "40_compare": {"memory_mb": 900}}
    found = resources_of(tmp_path, optimizers=["sam"], train=train, resources=given)
    default = {"threads": 1, "gpu": 0, "mem_mb": 4000, "runtime": 240}
    assert found["brain-mr/sam-processes=2/seed0/10_train"] == default | {"threads": 8, "gpu": 2}
    assert found["brain-mr/sam-processes=4/seed0/10_train"] == default | {"threads": 16, "gpu": 4}
    assert found["none/20_evaluate"] == default | {"threads": 5, "gpu": 1, "runtime": 20}
    assert found["40_compare"] == default | {"mem_mb": 900}
    given = {"10_train": {"gpus": 0}}
    assert resources_of(tmp_path, train=train, resources=given)["brain-mr/sam-processes=2/seed0/10_train"]["gpu"] == 0


def test_every_notebook_has_resources():
    assert tuple(NOTEBOOKS) == NotebookName.__args__


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"10_trian": {}}, r"resources: expected one of 10_train, .*got '10_trian' \(did you mean 10_train\?\)"),
        ({"10_train": {"cpu": 2}}, r"(?s)section resources, notebook 10_train.*cpu: unknown; .*did you mean cpus"),
        ({"10_train": {"minutes": 0}}, r"(?s)notebook 10_train.*minutes: expected at least 1, got 0"),
        ({"10_train": {"memory_mb": "8 GB"}}, r"(?s)notebook 10_train.*memory_mb: expected a whole number, got '8 GB'"),
    ],
)
def test_wrong_resources_say_what_is_right(tmp_path, given, said):
    with pytest.raises(ConfigError, match=said):
        resources_of(tmp_path, resources=given)


# --- profiles


def test_an_unknown_profile_is_an_error_before_anything_is_computed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["study", "smoke", "--runs", str(tmp_path), "--profile", "slrum"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "no profile slrum: expected kubernetes, slurm or a folder with config.yaml" in capsys.readouterr().err


def profiles(checkout, name):
    """The options that a study gives Snakemake."""
    chosen = {"--profile": name, "--workflow-profile": "default"}
    return [word for option, name in chosen.items() for word in (option, str(checkout.folder / "profiles" / name))]


def test_kubernetes_is_given_the_resources_of_the_study(tmp_path, monkeypatch):
    """A dry run; `test_pods_that_share_a_volume_give_the_same_bytes` has more, and takes minutes."""
    pytest.importorskip("snakemake_executor_plugin_kubernetes")
    checkout = Checkout(tmp_path)
    checkout.path += os.pathsep + str(checkout.folder / "profiles/kubernetes")
    for name in ("FMSAM_CACHE", "JUPYTER_PATH", "PYTHONIOENCODING", "PYTHONUTF8"):  # the last three are the launcher's
        monkeypatch.setenv(name, os.environ.get(name, ""))
    checkout.plan(resources={"10_train": {"cpus": 3, "gpus": 1, "memory_mb": 9000}})
    told = checkout.snakemake("-n", *profiles(checkout, "kubernetes"), "--cores", "8")
    assert told.returncode == 0, told.stdout
    trains = [line for line in told.stdout.splitlines() if "gpu=1" in line]
    assert len(trains) == 2
    assert all("mem_mb=9000" in line and "gpu_manufacturer=nvidia" in line for line in trains)
    assert told.stdout.count("threads: 3") == 2


def test_slurm_is_given_the_resources_of_the_study(tmp_path, monkeypatch):
    """A dry run; then the launcher, with a stand-in for sbatch that notes what it is asked for and takes no job."""
    pytest.importorskip("snakemake_executor_plugin_slurm")
    needs = {"10_train": {"cpus": 3, "gpus": 1, "memory_mb": 9000, "minutes": 90}}
    checkout, programs, asked = Checkout(tmp_path), tmp_path / "programs", tmp_path / "asked"
    checkout.plan(resources=needs)
    told = checkout.snakemake("-n", *profiles(checkout, "slurm"), "--cores", "8").stdout  # asks for no more than these
    assert told.count("gpu=1, mem_mb=9000") + told.count("gpu=1, runtime=90, mem_mb=9000") == 2
    assert told.count("threads: 3") == told.count("runtime=90") == 2

    programs.mkdir()
    of_slurm = {"sacct": "echo mine", "sacctmgr": "echo mine", "sinfo": "echo 'all*'"}
    for name, does in (of_slurm | {"sbatch": f"printf '%s ' \"$@\" >> {asked}; echo >> {asked}; exit 1"}).items():
        (programs / name).write_text(f"#!/bin/sh\n{does}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(programs), os.environ["PATH"]]))
    study = tmp_path / "tiny.yaml"
    study.write_text(yaml.safe_dump(TINY | {"resources": needs}))
    profile = shutil.copytree(PROJECT / "profiles/slurm", tmp_path / "profile")
    told = yaml.safe_load((profile / "config.yaml").read_text())
    hurried = {"retries": 0, "slurm-init-seconds-before-status-checks": 1, "seconds-between-status-checks": 1}
    (profile / "config.yaml").write_text(yaml.safe_dump(told | hurried))
    assert compute(study, tmp_path / "cluster", "--profile", str(profile)).returncode == 1
    train = [line for line in asked.read_text().splitlines() if "rule_10_train" in line]
    assert train
    words = ["-t", "90", "--mem", "9000", "--cpus-per-task=3", "--gpus=1"]
    assert all(set(words) <= set(line.split()) for line in train)


def compute(study, runs, *more, run=subprocess.run):
    command = [sys.executable, "-m", "fmsam_lib.study", str(study), "--runs", str(runs), *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return run(command, env=os.environ | {"PYTHONPATH": str(PROJECT)}, **pipes)


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["mem_mb=7000", "gpu=1"])
def test_a_profile_of_one_machine_limits_memory_and_gpus(tmp_path, limit):
    """Two cores are there, but not the memory for two notebooks, or a GPU for each."""
    study, profile = tmp_path / "tiny.yaml", tmp_path / "profile"
    profile.mkdir()
    (profile / "config.yaml").write_text(yaml.safe_dump({"cores": 2, "resources": [limit]}))
    needs = {name: {"gpus": 1} for name in ("10_train", "20_evaluate")}
    study.write_text(yaml.safe_dump(TINY | {"train": TINY["train"] | {"steps": 10}, "resources": needs}))
    done = compute(study, tmp_path / "runs", "--profile", str(profile))
    assert (done.returncode, done.stderr) == (0, "")
    notebooks = (tmp_path / "runs/tiny").glob("*/**/[12]0_*.ipynb")
    ran = [json.loads(path.read_text())["metadata"]["papermill"] for path in notebooks]
    ran = sorted((one["start_time"], one["end_time"]) for one in ran)
    assert len(ran) == 5
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ran))


# --- a cluster


@pytest.fixture
def cluster(tmp_path):
    """The profile of a cluster that is served, its queue and the folder for runs, which it watches."""
    pytest.importorskip("snakemake_executor_plugin_cluster_generic")
    queue, profile, runs = tmp_path / "queue", tmp_path / "profile", tmp_path / "runs"
    queue.mkdir()
    profile.mkdir()
    told = {"executor": "cluster-generic", "jobs": 4, "retries": 2, "latency-wait": 30}
    for name in ("submit", "status", "cancel"):
        script = profile / name
        script.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, str(SCHEDULER), str(queue), name])} "$@"\n')
        script.chmod(0o755)
        told[f"cluster-generic-{name}-cmd"] = str(script)
    (profile / "config.yaml").write_text(yaml.safe_dump(told | {"seconds-between-status-checks": 1}))
    server = subprocess.Popen([sys.executable, SCHEDULER, queue, "serve", runs])
    yield profile, queue, runs
    server.terminate()
    server.wait(30)


@pytest.mark.slow
def test_a_cluster_that_loses_a_node_and_answers_late_gives_the_same_bytes(cluster, tmp_path):
    profile, queue, runs = cluster
    study = tmp_path / "tiny.yaml"
    given = {"10_train": {"cpus": 3, "memory_mb": 900, "minutes": 15}}
    study.write_text(yaml.safe_dump(TINY | {"resources": given}))
    done = compute(study, runs, "--profile", str(profile))
    root = runs / "tiny"
    assert done.returncode == 0, done.stderr + (root / "snakemake.log").read_text()
    assert done.stderr == ""
    assert (queue / f"{(queue / 'lost').read_text()}.ended").read_text() == "failed"
    assert len(list(queue.glob("*.job"))) == 7  # six notebooks, one of them twice
    asked = [json.loads(path.read_text()) for path in queue.glob("*.asked")]
    asked = {(job["rule"], job["threads"], *map(job["resources"].get, ("mem_mb", "runtime"))) for job in asked}
    trains, others = ("10_train", 3, 900, 15), {(name, 1, 4000, 240) for name in ("20_evaluate", "compare")}
    assert asked == {trains, *others}
    here = compute(study, tmp_path / "here")
    assert here.returncode == 0, here.stderr
    assert results(root) == results(tmp_path / "here/tiny")
    resumed = [json.loads(path.read_text()).get("resumed", []) for path in root.glob("*/*/seed*/config.json")]
    assert sorted(map(len, resumed)) == [0, 1]  # the lost one went on from its checkpoint

    def kept():
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in root.glob("*/*/seed0/[!.]*")}

    before = kept()
    study.write_text(yaml.safe_dump(TINY | {"resources": given, "seeds": [0, 1]}))
    assert compute(study, runs, "--profile", str(profile)).returncode == 0
    assert len(list(queue.glob("*.job"))) == 7 + 5  # the new seed's trainings and evaluations, and the report
    assert kept() == before
    assert (root / "results.csv").read_text().count(",sam-rho=0.02,1,")


def interrupt(tmp_path, runs, profile):
    """Start a study that takes long, and end it by Ctrl-C once it trains."""
    study = tmp_path / "long.yaml"
    study.write_text(yaml.safe_dump(TINY | {"train": TINY["train"] | {"steps": 20000}}))
    process = compute(study, runs, "--profile", str(profile), run=subprocess.Popen)
    deadline = time.monotonic() + 120
    while not list(runs.glob("long/*/*/seed0/history.jsonl")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=90)
    assert process.returncode == 130
    assert "the same command goes on from here" in said


@pytest.mark.slow
def test_an_interrupted_study_takes_its_jobs_off_the_cluster(cluster, tmp_path):
    profile, queue, runs = cluster
    (queue / "lost").touch()  # no node dies here
    interrupt(tmp_path, runs, profile)
    started = {path.stem for path in queue.glob("*.started")}
    deadline = time.monotonic() + 20
    while {path.stem for path in queue.glob("*.ended")} < started:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert list(queue.glob("*.cancel"))


# --- Kubernetes


@pytest.fixture
def kubernetes(tmp_path, monkeypatch):
    """A cluster, and the profile of this project with what a person writes into it."""
    pytest.importorskip("snakemake_executor_plugin_kubernetes")
    profile = shutil.copytree(PROJECT / "profiles/kubernetes", tmp_path / "profile")
    told = yaml.safe_load((profile / "config.yaml").read_text())
    told |= {"container-image": "study:1", "kubernetes-volume-persistent-volumes": [f"claim:{tmp_path}"]}
    hurried = {"jobs": 2, "latency-wait": 30, "seconds-between-status-checks": 1}
    (profile / "config.yaml").write_text(yaml.safe_dump(told | hurried))
    cluster = Cluster(tmp_path / "cluster", tmp_path / "runs")
    monkeypatch.setenv("KUBECONFIG", str(cluster.config))
    monkeypatch.setenv("FMSAM_CACHE", str(tmp_path / "cache"))
    yield cluster, profile
    cluster.close()


@pytest.mark.slow
def test_pods_that_share_a_volume_give_the_same_bytes(kubernetes, tmp_path):
    cluster, profile = kubernetes
    study, root = tmp_path / "tiny.yaml", tmp_path / "runs/tiny"
    study.write_text(yaml.safe_dump(TINY | {"resources": {"10_train": {"cpus": 3, "gpus": 1, "memory_mb": 900}}}))
    done = compute(study, tmp_path / "runs", "--profile", str(profile))
    assert done.returncode == 0, done.stderr + (root / "snakemake.log").read_text()
    assert done.stderr == ""
    assert len(cluster.jobs) == 8  # six notebooks, two of them twice
    assert {*cluster.deleted} == {*cluster.jobs} - {cluster.lost}
    assert cluster.failed in cluster.deleted
    assert (root / f".snakemake/auxiliary/kubernetes-logs/{cluster.failed}.log").is_file()
    assert not cluster.secrets
    containers = [container_of(job) for job in cluster.jobs.values()]
    limits = {tuple(c["resources"]["limits"][name] for name in ("cpu", "memory", "nvidia.com/gpu")) for c in containers}
    assert limits == {("3000m", "900M", "1"), ("1000m", "4000M", "0")}
    mounts = {(c["image"], volume["name"], volume["mountPath"]) for c in containers for volume in c["volumeMounts"]}
    assert mounts == {("study:1", "workdir", "/workdir"), ("study:1", "claim", str(tmp_path))}
    here = compute(study, tmp_path / "here")
    assert here.returncode == 0, here.stderr
    assert results(root) == results(tmp_path / "here/tiny")
    resumed = [json.loads(path.read_text()).get("resumed", []) for path in root.glob("*/*/seed*/config.json")]
    assert sorted(map(len, resumed)) == [0, 1]  # the lost one went on from its checkpoint


@pytest.mark.slow
def test_an_interrupted_study_deletes_its_pods(kubernetes, tmp_path):
    cluster, profile = kubernetes
    cluster.lost = "none"
    interrupt(tmp_path, tmp_path / "runs", profile)
    assert cluster.jobs
    assert {*cluster.deleted} == {*cluster.jobs}
    assert not cluster.pods
    assert not cluster.secrets
