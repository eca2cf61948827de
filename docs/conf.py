"""What `make site` builds: README, docs and notebooks as one static site with search, by Sphinx and myst-nb.

The pages are those that GitHub shows. Only the table of contents is added, and links to code lead to the repository.
"""

import re
import shutil
import tomllib
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

ROOT = Path(__file__).resolve().parents[1]
ABOUT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CODE = ABOUT["urls"]["Repository"] + "/blob/HEAD"

PAGES = ["results", "synthetic", "protocol", "pretrained", "method", "model", "sam", "register", "benchmarks", "grid"]
PAGES += ["faults", "extending", "faq"]
TEACHING = ["00_start_here", "01_look_at_the_data", "02_registration_by_hand", "03_the_network", "04_sam_explained"]
TEACHING += ["05_how_far_to_climb", "06_does_sam_help", "60_when_not_to_trust_it"]
STUDY = ["10_train", "20_evaluate", "30_loss_landscape", "35_between_minima", "40_compare", "50_register_your_own"]
CONTENTS = {
    "Learn": [f"notebooks/{name}" for name in TEACHING],
    "Read": [f"docs/{name}" for name in PAGES],
    "Run": [f"notebooks/{name}" for name in STUDY],
    "Take part": ["CONTRIBUTING", "CHANGELOG"],
}
REPORTS = {path.parent.name: path for path in sorted((ROOT / "runs").glob("*/report.html"))}

project, author, html_title = ABOUT["name"], "fmsam contributors", ABOUT["name"]
extensions = ["myst_nb"]
html_theme, html_show_copyright = "furo", False
html_math_renderer = "mathml"  # browsers draw it themselves; MathJax would come from the network
nb_ipywidgets_js: dict = {}  # the same: the site shows the still pictures
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "notebooks/*.ipynb"]
exclude_patterns = [".*", "runs", "data"]  # not to walk through them
myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 3  # GitHub's names
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "runs" / "site-executed")
nb_execution_excludepatterns = [f"notebooks/{name}.ipynb" for name in STUDY]  # they need a study's runs
nb_execution_timeout = 600  # seconds a cell
nb_execution_raise_on_error = True


def prepared(name: str, text: str) -> str:
    """A page as Sphinx needs it: README with the contents, links to code with the repository's address."""
    if name == root_doc:
        if REPORTS:
            text += "\n## Reports of studies\n\n"
            text += "".join(f'- <a href="reports/{study}.html">{study}</a>\n' for study in REPORTS)
        for caption, pages in CONTENTS.items():
            listed = "\n".join(pages)
            text += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```\n"
    code = r"fmsam_lib|tests|studies|benchmarks|\.github|\.binder|Snakefile|Makefile|LICENSE|\w+\.(?:toml|txt|yml|cff)"
    return re.sub(rf"\]\((?:\.\./)?((?:{code})[^)]*)\)", rf"]({CODE}/\1)", text)


def prepare(app, name, source):
    source[0] = prepared(name, source[0])


def finish(app, error):
    """README is the first page; reports are whole pages of their own."""
    folder = Path(app.outdir)
    if error is None:
        shutil.copy(folder / "README.html", folder / "index.html")
        (folder / "reports").mkdir(exist_ok=True)
        for study, report in REPORTS.items():
            shutil.copy(report, folder / "reports" / f"{study}.html")


def equation(translator, node):
    block = isinstance(node, nodes.math_block)
    drawn = tex2mathml(node.astext(), as_block=block)
    translator.body.append(f'<div style="padding: 0.5em 0">{drawn}</div>' if block else drawn)  # room: no scroll bar
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (equation, None), (equation, None))
    app.connect("source-read", prepare)
    app.connect("build-finished", finish)
