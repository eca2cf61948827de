"""What a stranger meets first agrees with the project: address, citation, forms, workflow, Binder, Colab, site."""

import ast
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest
import SimpleITK
import yaml
from docutils.utils.math.latex2mathml import tex2mathml

from tests.conftest import PROJECT, as_module
from tests.test_environment import constraints, name_of

ABOUT = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ADDRESS = ABOUT["urls"]["Repository"]
FORMS = sorted((PROJECT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
NAMED = [
    *(PROJECT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "environment.yml")),
    *(path for folder in ("docs", ".github", ".binder") for path in sorted((PROJECT / folder).rglob("*"))),
    *sorted((PROJECT / "notebooks").glob("*.ipynb")),
]


def read(name):
    return (PROJECT / name).read_text(encoding="utf-8")


def load(name):
    return yaml.safe_load(read(name))


# --- the address, the citation, the changelog


def test_the_repository_has_one_address():
    places = r"(?:https://github\.com|mybinder\.org/v2/gh|colab\.research\.google\.com/github)/([\w.-]+/fmsam)\b"
    found = {path.name: re.findall(places, path.read_text(encoding="utf-8")) for path in NAMED if path.is_file()}
    named = {name for name, addresses in found.items() if addresses}
    assert named == {"CONTRIBUTING.md", "CITATION.cff", "config.yml", "faq.md"}
    own = ADDRESS.removeprefix("https://github.com/")
    assert not {name: addresses for name, addresses in found.items() if set(addresses) - {own}}


def test_the_citation_is_that_of_the_project_and_of_readmes_papers():
    cited = load("CITATION.cff")
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= cited.keys()
    assert (cited["version"], cited["license"], cited["repository-code"]) == (
        ABOUT["version"],
        ABOUT["license"],
        ADDRESS,
    )
    assert cited["title"].startswith(f"{ABOUT['name']}: ")
    assert cited["authors"] == [{"name": "fmsam contributors"}]
    papers = {paper["url"].removeprefix("https://arxiv.org/abs/"): paper for paper in cited["references"]}
    told = {
        number: (paper["title"], paper["year"], [author["family-names"] for author in paper["authors"]])
        for number, paper in papers.items()
    }
    assert told == {
        "2505.06527": (
            "Improving Generalization of Medical Image Registration Foundation Model",
            2025,
            ["Hu", "Yu", "Xian", "Hu", "Wang"],
        ),
        "2403.05780": (
            "uniGradICON: A Foundation Model for Medical Image Registration",
            2024,
            ["Tian", "Greer", "Kwitt", "Vialard", "San José Estépar", "Bouix", "Rushmore", "Niethammer"],
        ),
    }
    assert {*papers} == {*re.findall(r"https://arxiv\.org/abs/([\d.]+)", read("README.md"))}
    for number, paper in papers.items():
        assert paper["identifiers"] == [{"type": "other", "value": f"arXiv:{number}"}]


def test_the_changelog_keeps_its_form():
    title, *versions = re.findall(r"^##? (.+)$", read("CHANGELOG.md"), re.MULTILINE)
    assert (title, versions[0]) == ("Changelog", "Unreleased")
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", version) for version in versions[1:])
    kinds = set(re.findall(r"^### (.+)$", read("CHANGELOG.md"), re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


# --- GitHub


def test_the_workflow_runs_the_two_commands_with_least_permissions():
    workflow = load(".github/workflows/ci.yml")
    assert workflow["permissions"] == {"contents": "read"}
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads `on` as true
    (job,) = workflow["jobs"].values()
    systems, versions = job["strategy"]["matrix"]["os"], job["strategy"]["matrix"]["python"]
    assert {system.split("-")[0] for system in systems} == {"ubuntu", "macos"}
    assert f">={versions[0]}" == ABOUT["requires-python"]
    assert set(versions) == {"3.11", "3.12", "3.13"}
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == ["make test", "make study STUDY=smoke"]
    for command in commands:
        done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=PROJECT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    actions = {step["uses"].split("@")[0]: step["with"] for step in job["steps"] if "uses" in step}
    assert actions["actions/checkout"]["persist-credentials"] is False
    files = actions["actions/setup-python"]["cache-dependency-path"].split()
    assert actions["actions/setup-python"]["cache"] == "pip"
    assert all((PROJECT / file).exists() for file in files)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_is_one(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem == "config":
        for link in form["contact_links"]:
            assert link.keys() == {"name", "url", "about"}
            assert (PROJECT / link["url"].removeprefix(f"{ADDRESS}/blob/HEAD/")).exists()
        return
    assert form.keys() == {"name", "description", "labels", "body"}
    for field in form["body"]:
        assert field["type"] in ("markdown", "input", "textarea")
        assert ("value" if field["type"] == "markdown" else "label") in field["attributes"]
        assert field.keys() <= {"type", "id", "attributes", "validations"}
    names = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert names
    assert len(set(names)) == len(names)
    assert any(field.get("validations", {}).get("required") for field in form["body"])


def test_the_forms_commands_run(tmp_path):
    commands = {command for path in FORMS for command in re.findall(r"`python (-c .*)`", path.read_text())}
    versions, header = sorted(commands, key=lambda command: "SimpleITK" in command)
    told = ast.literal_eval(run(versions))
    assert {"commit", "python", "packages", "platform"} <= told.keys()
    SimpleITK.WriteImage(SimpleITK.Image(4, 3, SimpleITK.sitkUInt8), str(tmp_path / "a.nii.gz"))
    assert "Direction" in run(header.replace("FILE", str(tmp_path / "a.nii.gz")))


def run(command):
    done = subprocess.run([sys.executable, *shlex.split(command)], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- Binder and Colab


def test_binder_gets_the_pinned_torch_and_python():
    environment = load(".binder/environment.yml")
    versions = dict(entry.split("=") for entry in environment["dependencies"] if "=" in entry)
    assert versions == {"python": ABOUT["requires-python"].removeprefix(">="), "pytorch-cpu": constraints()["torch"]}
    assert environment["channels"] == ["conda-forge"]


def test_binders_script_installs_the_project_but_not_another_torch(tmp_path):
    """Run in a copy, with a `python` that only writes down what it is asked."""
    for name in (".binder", "profiles"):
        shutil.copytree(PROJECT / name, tmp_path / name)
    shutil.copy(PROJECT / "constraints.txt", tmp_path)
    script = tmp_path / ".binder" / "postBuild"
    assert os.access(script, os.X_OK)
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = -c ]; then echo "{tmp_path}/prefix"; exit; fi\n'
        'echo "$@" >asked.txt\n'
        'while [ "$1" != -c ]; do shift; done\n'
        'cp "$2" given.txt\n'
    )
    fake.chmod(0o755)
    path = {"PATH": f"{fake.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([str(script)], cwd=tmp_path, env=os.environ | path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked = shlex.split((tmp_path / "asked.txt").read_text())
    assert asked[:3] == ["-m", "pip", "install"]
    assert asked[-2:] == ["-e", "."]
    lines = read("constraints.txt").splitlines()
    given = (tmp_path / "given.txt").read_text().splitlines()
    assert given == [line for line in lines if not line.startswith("torch==")]
    assert len(given) == len(lines) - 1
    settings = tmp_path / "prefix/share/jupyter/lab/settings/overrides.json"
    assert settings.read_bytes() == (PROJECT / "profiles/jupyter/overrides.json").read_bytes()


def test_the_badges_open_notebooks_that_exist():
    opened = re.findall(r"(?:lab/tree|blob/main)/(notebooks/[\w.]+)\)", read("docs/faq.md"))
    assert len(opened) == 2
    assert all((PROJECT / path).exists() for path in opened)


def test_colabs_cell_installs_what_the_library_imports_and_colab_lacks():
    has = {"ipywidgets", "matplotlib", "numpy", "pandas", "pydantic", "pyyaml", "scipy", "statsmodels", "torch", "tqdm"}
    tools = {"ipykernel", "jupyterlab", "nbconvert", "papermill", "snakemake"}  # of `make lab` and `make study`
    cell = re.search(r"```ipython\n(.*?)```", read("docs/faq.md"), re.DOTALL)[1]
    library, others = cell.splitlines()
    assert library == f"%pip install --quiet --no-deps git+{ADDRESS}"
    assert others.startswith("%pip install --quiet ")
    wanted = {name_of(requirement) for requirement in ABOUT["dependencies"]}
    assert set(others.split()[3:]) == wanted - has - tools


# --- the site


@pytest.fixture(scope="module")
def site():
    return as_module("docs/conf.py")


def test_every_page_and_notebook_is_in_the_sites_contents_once(site):
    listed = [page for pages in site.CONTENTS.values() for page in pages]
    pages = [*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md"), *PROJECT.glob("notebooks/*.ipynb")]
    there = [str(page.relative_to(PROJECT).with_suffix("")) for page in pages]
    assert sorted([*listed, site.root_doc]) == sorted(there)


def test_teaching_notebooks_are_executed_and_no_other(site):
    executed = {page.removeprefix("notebooks/") for page in site.CONTENTS["Learn"]}
    assert {name for name in executed if name < "10" or name.startswith("60")} == executed
    skipped = {path.removeprefix("notebooks/").removesuffix(".ipynb") for path in site.nb_execution_excludepatterns}
    assert executed | skipped == {path.stem for path in (PROJECT / "notebooks").glob("*.ipynb")}
    assert not executed & skipped


def test_links_to_code_lead_to_the_repository_and_links_to_pages_stay(site):
    text = "[a](../fmsam_lib/study) [b](fmsam_lib/pair.py) [c](../Snakefile) [d](../README.md#x) [e](sam.md) [f](#g)"
    code = f"{ADDRESS}/blob/HEAD"
    assert site.prepared("docs/method", text) == (
        f"[a]({code}/fmsam_lib/study) [b]({code}/fmsam_lib/pair.py) [c]({code}/Snakefile) "
        "[d](../README.md#x) [e](sam.md) [f](#g)"
    )


def test_readme_gets_the_contents_and_the_reports(site, monkeypatch):
    monkeypatch.setattr(site, "REPORTS", {"quick": PROJECT / "runs/quick/report.html"})
    text = site.prepared("README", "# fmsam\n")
    assert text.count("```{toctree}") == len(site.CONTENTS)
    assert '<a href="reports/quick.html">quick</a>' in text
    assert site.prepared("docs/sam", "# SAM\n") == "# SAM\n"


def test_every_equation_can_be_drawn_without_a_network():
    texts = {path: path.read_text(encoding="utf-8") for path in PROJECT.glob("docs/*.md")}
    for path in PROJECT.glob("notebooks/*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts[path] = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    equations = 0
    for text in texts.values():
        plain = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
        for block, inline in re.findall(r"\$\$(.+?)\$\$|\$([^$]+)\$", plain, re.DOTALL):
            assert "<math" in tex2mathml(block or inline, as_block=bool(block))
            equations += 1
    assert equations > 50


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_can_be_searched(tmp_path):
    """Notebooks as they are, unexecuted; -W -n: a link that leads nowhere is an error."""
    for name in ABOUT["optional-dependencies"]["site"]:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"no {name}: `make site` installs it")
    options = ["-W", "--keep-going", "-n", "-q", "-D", "nb_execution_mode=off", "-c", "docs", "."]
    command = [sys.executable, "-m", "sphinx", *options, str(tmp_path)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").read_text() == (tmp_path / "README.html").read_text()
    assert "sharp" in (tmp_path / "searchindex.js").read_text()
    pages = [*tmp_path.rglob("*.html")]
    from_the_network = re.compile(r'<(?:script|link|img)[^>]*(?:src|href)="https?://(?!mybinder|colab)')
    assert not [page.name for page in pages if from_the_network.search(page.read_text(encoding="utf-8"))]
