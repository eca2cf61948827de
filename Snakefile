# A study as a graph of papermill notebooks. `python -m fmsam_lib.study NAME` writes the notebooks' parameter files and
# calls this. A rule a notebook, of the table NOTEBOOKS; an executed notebook is a rule's log, so that it stays when the
# rule fails.
import shlex
import sys
from pathlib import Path

from fmsam_lib.study.file import read_study
from fmsam_lib.study.notebooks import NOTEBOOKS, jobs

root, study_file = Path(config["root"]), Path(config["study"])
*work, comparison = jobs(read_study(study_file), root, "", study_file)
needs = {(job.folder, job.notebook): [root / file for file in job.needs] for job in work}
python = shlex.quote(sys.executable)
papermill = f"FMSAM_HEADLESS=1 {python} -m papermill --cwd notebooks --log-level ERROR --no-progress-bar"
to_html = f"{python} -m jupyter nbconvert --log-level ERROR --to html --no-prompt --template-file notebooks/folded.html.j2"


# Tables and weights are asked for too: Snakemake would not miss what was removed behind a report that is there.
rule study:
    input:
        [root / file for job in (*work, comparison) for file in job.makes],


for name in {job.notebook: None for job in work}:

    rule:
        name:
            name
        input:
            notebook=ancient(f"notebooks/{name}.ipynb"),
            parameters=root / f"{{folder}}/{name}.yaml",
            needs=lambda wildcards, name=name: needs[wildcards.folder, name],
        output:
            [root / "{folder}" / file for file in NOTEBOOKS[name].makes],
        log:
            root / f"{{folder}}/{name}.ipynb",
        shell:
            "{papermill} {input.notebook} {log:q} -f {input.parameters:q}"


rule compare:
    input:
        notebook=ancient("notebooks/40_compare.ipynb"),
        parameters=root / "40_compare.yaml",
        left_out=root / "left_out.json",
        needs=[root / file for file in comparison.needs],
    output:
        root / "report.html",
    log:
        root / "40_compare.ipynb",
    shell:
        "{papermill} {input.notebook} {log:q} -f {input.parameters:q} && {to_html} --output {output:q} {log:q}"


# The same report of whatever is there, after other rules have failed.
rule what_there_is:
    log:
        root / "40_compare.ipynb",
    params:
        parameters=root / "40_compare.yaml",
        report=root / "report.html",
    shell:
        "{papermill} notebooks/40_compare.ipynb {log:q} -f {params.parameters:q}"
        " && {to_html} --output {params.report:q} {log:q}"
