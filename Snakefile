# A study as a graph of papermill notebooks. `python -m fmsam_lib.study NAME` writes the notebooks'
# parameter files and calls this; an executed notebook is a rule's log, so that it stays when the rule fails.
import shlex
import sys
from pathlib import Path

from fmsam_lib.study.file import read_study
from fmsam_lib.study.grid import between_folder, grid, twins
from fmsam_lib.study.notebooks import outputs

root = Path(config["root"])
study = read_study(f"studies/{config['study']}.yaml")
solutions = {between_folder(pair[0]): [root / run.folder / "weights.pt" for run in pair] for pair in twins(study)}
python = shlex.quote(sys.executable)
papermill = f"FMSAM_HEADLESS=1 {python} -m papermill --cwd notebooks --log-level ERROR --no-progress-bar"
to_html = f"{python} -m jupyter nbconvert --log-level ERROR --to html --no-input --no-prompt"


wildcard_constraints:
    run=r".+/seed\d+",


# Tables and weights are asked for too: Snakemake would not miss what was removed behind a report that is there.
rule report:
    input:
        root / "report.html",
        [root / file for file in outputs(study)],
        [root / run.folder / "weights.pt" for run in grid(study)],


rule train:
    input:
        notebook=ancient("notebooks/10_train.ipynb"),
        parameters=root / "{run}/10_train.yaml",
    output:
        root / "{run}/weights.pt",
    log:
        root / "{run}/10_train.ipynb",
    shell:
        "{papermill} {input.notebook} {log:q} -f {input.parameters:q}"


rule evaluate:
    input:
        notebook=ancient("notebooks/20_evaluate.ipynb"),
        parameters=root / "{run}/20_evaluate.yaml",
        weights=root / "{run}/weights.pt",
    output:
        root / "{run}/results.csv",
        root / "{run}/robustness.csv",
    log:
        root / "{run}/20_evaluate.ipynb",
    shell:
        "{papermill} {input.notebook} {log:q} -f {input.parameters:q}"


rule no_registration:
    input:
        notebook=ancient("notebooks/20_evaluate.ipynb"),
        parameters=root / "none/20_evaluate.yaml",
    output:
        root / "none/results.csv",
        root / "none/robustness.csv",
    log:
        root / "none/20_evaluate.ipynb",
    shell:
        "{papermill} {input.notebook} {log:q} -f {input.parameters:q}"


rule instance_optimisation_alone:
    input:
        notebook=ancient("notebooks/20_evaluate.ipynb"),
        parameters=root / "io/20_evaluate.yaml",
        form=root / grid(study)[0].folder / "weights.pt",
    output:
        root / "io/results.csv",
    log:
        root / "io/20_evaluate.ipynb",
    shell:
        "{papermill} {input.notebook} {log:q} -f {input.parameters:q}"


rule between:
    input:
        notebook=ancient("notebooks/35_between_minima.ipynb"),
        parameters=root / "{between}/35_between_minima.yaml",
        weights=lambda wildcards: solutions[wildcards.between],
    output:
        root / "{between}/between.csv",
    log:
        root / "{between}/35_between_minima.ipynb",
    shell:
        "{papermill} {input.notebook} {log:q} -f {input.parameters:q}"


rule landscape:
    input:
        notebook=ancient("notebooks/30_loss_landscape.ipynb"),
        parameters=root / "{run}/30_loss_landscape.yaml",
        weights=root / "{run}/weights.pt",
    output:
        root / "{run}/landscape.csv",
        root / "{run}/flatness.csv",
    log:
        root / "{run}/30_loss_landscape.ipynb",
    shell:
        "{papermill} {input.notebook} {log:q} -f {input.parameters:q}"


rule compare:
    input:
        notebook=ancient("notebooks/40_compare.ipynb"),
        parameters=root / "40_compare.yaml",
        left_out=root / "left_out.json",
        tables=[root / file for file in outputs(study)],
    output:
        root / "report.html",
    log:
        root / "40_compare.ipynb",
    shell:
        "{papermill} {input.notebook} {log:q} -f {input.parameters:q} && {to_html} --output {output:q} {log:q}"


# The same comparison of whatever is there, after other rules have failed.
rule what_there_is:
    log:
        root / "40_compare.ipynb",
    params:
        parameters=root / "40_compare.yaml",
        report=root / "report.html",
    shell:
        "{papermill} notebooks/40_compare.ipynb {log:q} -f {params.parameters:q}"
        " && {to_html} --output {params.report:q} {log:q}"
