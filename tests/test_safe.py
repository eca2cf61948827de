"""Files of strangers run no code: weights, checkpoints, study files, names of data sets, downloads, reports."""

import ast
import contextlib
import hashlib
import io
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
import warnings
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.request import Request

import nbformat
import pytest
import torch
import yaml
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from fmsam_lib.checking import ConfigError, read
from fmsam_lib.flatness.mode_connectivity import trajectories
from fmsam_lib.model import weights as networks
from fmsam_lib.parameters import Train
from fmsam_lib.records import DataError
from fmsam_lib.study.file import read_study
from fmsam_lib.study.notebooks import jobs, plan
from fmsam_lib.training.checkpoint import resume
from tests.conftest import PROJECT, as_module
from tests.test_browser import CHROMIUM, FLAGS

fetch_hippocampus = as_module("studies/fetch_hippocampus.py").fetch_hippocampus
STUDY = {
    **{"description": "d", "train_domains": ["brain-mr"], "test_domains": ["brain-mr"], "optimizers": ["adam"]},
    **{"seeds": [0], "shape": [32, 32], "train": {}, "evaluate": {}, "landscape": None},
}
NAMES = [
    "$(touch x)",
    "; touch x",
    "`touch x`",
    "&& touch x",
    "| touch x",
    "> x",
    "' touch x \"",
    "a b",
    "*",
    "~",
    "%s",
    "é",
]
VALUES = [*NAMES, '"; touch x', "\\", '\\"', '"""', "a\nb", "{x}", "${x}", "\r", "\0", '"\nimport os\nos.mkdir("x")\n"']


class Evil:
    """Its pickle makes the file `at`."""

    def __init__(self, at):
        self.at = at

    def __reduce__(self):
        return (Path.touch, (self.at,))


def study_of(folder, **change):
    (folder / "s.yaml").write_text(yaml.safe_dump(STUDY | change, allow_unicode=True), encoding="utf-8")
    return read_study(folder / "s.yaml")


# --- weights and checkpoints

WITH_CODE = "torch.load(written, weights_only=False)"  # below, where the code is harmless


def is_load(node):
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"


def test_every_file_of_torch_is_read_without_pickles_code():
    """In notebooks and tests too: the word stands beside each call, whatever a version of torch takes for granted."""
    cells = [cell for path in (PROJECT / "notebooks").glob("*.ipynb") for cell in nbformat.read(path, 4).cells]
    sources = [cell.source for cell in cells if cell.cell_type == "code"]
    folders = ("fmsam_lib", "benchmarks", "studies", "docs", "tests")
    sources += [path.read_text(encoding="utf-8") for name in folders for path in (PROJECT / name).rglob("*.py")]
    calls = [ast.unparse(node) for source in sources for node in ast.walk(ast.parse(source)) if is_load(node)]
    assert len(calls) > 5
    assert [call for call in calls if "weights_only=True" not in call] == [WITH_CODE]
    others = (
        r"\b(pickle|joblib|dill)\.loads?\(|read_pickle|allow_pickle|yaml\.(unsafe_|full_)?load\(|shell=True|os\.system"
    )
    library = [path.read_text(encoding="utf-8") for path in (PROJECT / "fmsam_lib").rglob("*.py")]
    assert not [found.group() for source in library for found in re.finditer(others, source)]


@pytest.mark.parametrize("name", ["weights.pt", "checkpoint.pt", "snapshots/step000001.pt"])
def test_code_in_a_file_of_a_training_is_not_run(tmp_path, name):
    run, solutions = read(Train, {"out": str(tmp_path)}), SimpleNamespace(corners=[None, None])
    ways = {
        "weights.pt": lambda: networks.load(tmp_path / name),
        "checkpoint.pt": lambda: resume(tmp_path, {"parameters": run.model_dump(), "start": ""}, {}),
        "snapshots/step000001.pt": lambda: trajectories(solutions, [("sam", tmp_path, 2)]),
    }
    (tmp_path / "snapshots").mkdir()
    torch.save({"net": Evil(tmp_path / "ran")}, tmp_path / name)
    written = shutil.copy(tmp_path / name, tmp_path / "copy")  # a training may put the other one aside
    with contextlib.suppress(ValueError, pickle.UnpicklingError), warnings.catch_warnings(action="ignore"):
        ways[name]()
    assert not (tmp_path / "ran").exists()
    torch.load(written, weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


# --- study files


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir [x]", "!!python/object/new:os.mkdir [x]", "!!python/name:os.mkdir ''"]
)
def test_a_study_file_builds_no_objects(tmp_path, monkeypatch, tag):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(STUDY) + f"always: {tag}\n")
    with pytest.raises(ConfigError, match=r"not valid YAML.*could not determine a constructor"):
        read_study(tmp_path / "s.yaml")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("key", ["x = 1\nimport os", "steps = 1; x", "__import__('os').mkdir('x')", "steps "])
def test_a_parameter_that_no_notebook_has_never_comes_into_its_code(tmp_path, key):
    with pytest.raises(ConfigError, match="unknown; known are"):
        study_of(tmp_path, train={key: 1})


@pytest.mark.parametrize("name", ["{x}", "{input}", "a\nb", "a\rb", "\0", "a\x1b[2Jb", "-f", "--help", ""])
@pytest.mark.parametrize("field", ["train_domains", "test_domains"])
def test_a_name_that_snakemake_or_a_command_reads_otherwise_is_refused(tmp_path, field, name):
    with pytest.raises(ConfigError, match=f"{field}: expected (a name without braces|at least one character)"):
        study_of(tmp_path, **{field: [name]})


@pytest.mark.parametrize("name", [*NAMES, "{x}", "{error.__class__.__mro__}", "{}", "../x", "/x", "a\nb", ""])
def test_a_variant_has_a_plain_name(tmp_path, name):
    if name not in ("é",):
        with pytest.raises(ConfigError, match="expected a name of letters"):
            study_of(tmp_path, variants={name: {"optimizer": "adam"}}, optimizers=[name or "adam"])


def test_a_shell_makes_words_of_names_not_commands(tmp_path):
    """Every command of a study's dry run, run with `printf` in the place of Python and `sync`."""
    study = study_of(tmp_path, train_domains=NAMES, test_domains=NAMES, description="$(touch x) {x}")
    work = jobs(study, tmp_path, "$(touch x)", tmp_path / "s.yaml")
    plan(work, tmp_path)
    (tmp_path / "left_out.json").write_text("[]")
    dry = [sys.executable, "-m", "snakemake", "--snakefile", str(PROJECT / "Snakefile"), "--directory", str(tmp_path)]
    dry += ["--profile", str(PROJECT / "profiles/default"), "--cores", "1", "--dry-run", "--printshellcmds"]
    told = subprocess.run(dry, capture_output=True, text=True, check=True)
    python = shlex.quote(sys.executable)
    lines = (told.stdout + told.stderr).splitlines()  # some versions of Snakemake say "Shell command:" first
    commands = [line[line.index("FMSAM") :] for line in lines if f"FMSAM_HEADLESS=1 {python} -m papermill" in line]
    said = []
    for command in commands:
        (tmp_path / "empty").mkdir(exist_ok=True)
        runs = f"{re.escape(python)} -m (?=papermill|jupyter)|(?<=&& )(?=sync )"
        shell = ["bash", "-c", re.sub(runs, r"printf '%s\\n' ", command)]
        words = subprocess.run(shell, cwd=tmp_path / "empty", capture_output=True, text=True, check=True).stdout
        assert not [*(tmp_path / "empty").iterdir()], command
        said.append(next(word for word in words.splitlines() if word.endswith(".ipynb")))
    assert sorted(said) == sorted(f"{job.name}.ipynb" for job in work)


@pytest.mark.parametrize("value", VALUES)
def test_a_value_stays_one_in_the_parameter_cell(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    notebook = load_notebook_node(str(PROJECT / "notebooks/10_train.ipynb"))
    notebook.metadata.papermill = {}
    cell = parameterize_notebook(notebook, {"weights": value, "down": [1], "lr": 1.0}).cells
    (given,) = [c.source for c in cell if "injected-parameters" in c.metadata.get("tags", [])]
    statements = ast.parse(given).body
    assert [ast.literal_eval(statement.value) for statement in statements] == [value, [1], 1.0]


# --- downloads


def archive(path, **members):
    """A tar of files, or of links where a value is a member of another type."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = content
                tar.addfile(member)
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


IMAGE = "Task04_Hippocampus/imagesTr/hippocampus_001.nii.gz"


@pytest.mark.parametrize(
    "members",
    [
        {"../out": b"x"},
        {"Task04_Hippocampus/../../out": b"x"},
        {"OUT": b"x"},
        {IMAGE: (tarfile.SYMTYPE, "SECRET")},
        {IMAGE: (tarfile.LNKTYPE, "../../secret")},
        {"Task04_Hippocampus/imagesTr": (tarfile.SYMTYPE, "SECRET_FOLDER"), IMAGE: b"x"},
    ],
    ids=["up", "up from within", "absolute", "symbolic link", "hard link", "folder's link"],
)
def test_an_archive_stays_in_its_folder(tmp_path, monkeypatch, members):
    """MONAI's own unpacking, of an archive with the right hash."""
    from monai.apps import DecathlonDataset

    folder, secret = tmp_path / "data", tmp_path / "elsewhere/secret"
    folder.mkdir()
    secret.parent.mkdir()
    secret.write_text("secret")
    real = {"OUT": str(tmp_path / "out"), "SECRET": str(secret), "SECRET_FOLDER": str(secret.parent)}
    members = {
        real.get(name, name): content if isinstance(content, bytes) else (content[0], real.get(content[1], content[1]))
        for name, content in members.items()
    }
    md5 = archive(folder / "Task04_Hippocampus.tar", **members)
    monkeypatch.setitem(DecathlonDataset.md5, "Task04_Hippocampus", md5)
    with pytest.raises(DataError, match=r"(Unsafe path|link) detected in archive"):
        fetch_hippocampus(folder)
    assert [path.name for path in folder.iterdir()] == ["Task04_Hippocampus.tar"]
    assert {path.name for path in tmp_path.iterdir()} == {"data", "elsewhere"}
    assert [path.name for path in secret.parent.iterdir()] == ["secret"]


def test_an_archive_with_another_hash_is_not_unpacked(tmp_path):
    archive(tmp_path / "Task04_Hippocampus.tar", **{IMAGE: b"x"})
    with pytest.raises(DataError, match="check of existing file failed"):
        fetch_hippocampus(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["Task04_Hippocampus.tar"]


@pytest.fixture
def server(tmp_path):
    """Serves what stands in `answers`: bytes, or the address that a request is sent on to."""
    answers: dict[str, bytes | str] = {}

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            content = answers[self.path]
            self.send_response(200 if isinstance(content, bytes) else 302)
            if isinstance(content, str):
                self.send_header("Location", content)
            body = content if isinstance(content, bytes) else b""
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()
    server.server_close()


def official(tmp_path, monkeypatch, address):
    monkeypatch.setenv("FMSAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(networks.OFFICIAL, "unigradicon", address)
    return networks.official("unigradicon")


def test_a_download_follows_redirects_of_its_own_scheme_alone(tmp_path, monkeypatch, server):
    address, answers = server
    torch.save({}, tmp_path / "w")
    content = (tmp_path / "w").read_bytes()
    answers |= {
        "/w": content,
        "/moved": f"{address}/w",
        "/file": (tmp_path / "w").as_uri(),
        "/ftp": "ftp://127.0.0.1/w",
    }
    for path in ("/file", "/ftp"):
        with pytest.raises(OSError, match=r"expected to download .*put it at"):
            official(tmp_path, monkeypatch, address + path)
    assert not [*(tmp_path / "cache/weights").iterdir()]
    there = official(tmp_path, monkeypatch, address + "/moved")
    assert there.read_bytes() == content
    assert there.with_suffix(".sha256").read_text().split() == [hashlib.sha256(content).hexdigest()]
    to_http = {"code": 302, "msg": "", "headers": {}, "fp": None, "newurl": "http://127.0.0.1/w"}
    with pytest.raises(OSError, match=r"a redirect from https to http://127\.0\.0\.1/w"):
        networks.SameScheme().redirect_request(Request("https://127.0.0.1/w"), **to_http)


def test_a_download_that_is_a_pickle_runs_nothing_and_is_not_kept(tmp_path, monkeypatch, server):
    address, answers = server
    torch.save(Evil(tmp_path / "ran"), tmp_path / "w")
    answers["/w"] = (tmp_path / "w").read_bytes()
    with pytest.raises(OSError, match="expected to download"):
        official(tmp_path, monkeypatch, f"{address}/w")
    assert not (tmp_path / "ran").exists()
    assert not [*(tmp_path / "cache/weights").iterdir()]


# --- Jupyter and the report


def test_nothing_switches_jupyters_token_off_or_opens_it_to_others():
    opened = re.compile(
        r"--ip\b|ServerApp\.ip|(Identity\w+|ServerApp|NotebookApp)\.(token|password)|--no-auth|allow_(origin|remote)|disable_check_xsrf"
    )
    files = [*PROJECT.glob("*.md"), PROJECT / "Makefile", PROJECT / "Snakefile"]
    for folder in (".binder", ".ci", ".github", "profiles", "docs", "tests", "benchmarks", "fmsam_lib", "notebooks"):
        files += [path for path in (PROJECT / folder).rglob("*") if path.suffix != ".pyc" and path.is_file()]
    wrong = [str(path) for path in files if path != Path(__file__) and opened.search(path.read_text("utf-8", "ignore"))]
    assert not wrong


def test_a_report_runs_no_script_that_a_study_or_a_data_set_brings(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Report")])
    hostile = "<script>document.title = 'ran'</script><img src=x onerror=\"document.title = 'ran'\">"
    output = nbformat.v4.new_output("display_data", {"text/markdown": hostile})
    notebook.cells.append(nbformat.v4.new_code_cell("", outputs=[output], metadata={"tags": ["answer"]}))
    nbformat.write(notebook, tmp_path / "n.ipynb")
    convert = ["nbconvert", "--log-level", "ERROR", "--to", "html", "--no-prompt", "--output", "n.html"]
    convert += ["--template-file", str(PROJECT / "studies/report.html.j2"), str(tmp_path / "n.ipynb")]
    subprocess.run([sys.executable, "-m", "jupyter", *convert], check=True, env=os.environ | {"HOME": str(tmp_path)})
    page = (tmp_path / "n.html").read_text(encoding="utf-8")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert page.index(policy) < page.index("<style")
    assert "onerror" in page
    if CHROMIUM:
        shown = [CHROMIUM, *FLAGS, "--dump-dom", (tmp_path / "n.html").as_uri()]
        dom = subprocess.run(shown, capture_output=True, text=True, timeout=60).stdout
        assert "<title>Report</title>" in dom
