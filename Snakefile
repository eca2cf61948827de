# A study as a graph of papermill notebooks. `python -m fmsam_lib.study NAME` writes the notebooks' parameter files and
# `plan.json` and calls this in the study's folder, from which all paths but the notebooks' count: what that is called is
# no matter. A rule a notebook; an executed notebook is a rule's log, so that it stays when the rule fails. Every job on
# another machine reads this again: it imports nothing that takes seconds, and not a study file that may have changed.
import json
import shlex
import sys
from pathlib import Path

notebooks = Path(workflow.basedir) / "notebooks"  # no rule's inputs: a checkout may move
*work, report = json.loads(Path("plan.json").read_text(encoding="utf-8"))
jobs = {(job["folder"], job["notebook"]): job for job in work}
python, there = shlex.quote(sys.executable), shlex.quote(str(notebooks))
# The kernel `python3` is that of profiles/jupyter, which starts this interpreter, whatever a person's own is. Notebooks
# come as standard input: papermill would fill in what stands in braces in a path. What the notebooks do not put on the
# disk themselves is put there before a job is done: a power cut would leave it empty.
papermill = f"FMSAM_HEADLESS=1 {python} -m papermill --kernel python3 --cwd {there} --log-level ERROR --no-progress-bar"
template = shlex.quote(str(notebooks.parent / "studies/report.html.j2"))
to_html = f"{python} -m jupyter nbconvert --log-level ERROR --to html --no-prompt --template-file {template}"


wildcard_constraints:
    folder="[^/].*",  # of the study: no log, executed notebooks all, is one of the notebooks


# Tables and weights are asked for too: Snakemake would not miss what was removed behind a report that is there.
rule study:
    input:
        [file for job in [*work, report] for file in job["makes"]],


for name, first in {job["notebook"]: job for job in work}.items():

    rule:
        name:
            name
        input:
            f"{{folder}}/{name}.asked.yaml",
            needs=lambda wildcards, name=name: jobs[wildcards.folder, name]["needs"],
        output:
            # Weights are not removed first, and come back where a training that is run again fails.
            [(update if name == "10_train" else str)(f"{{folder}}/{Path(file).name}") for file in first["makes"]],
        log:
            f"{{folder}}/{name}.ipynb",
        threads: lambda wildcards, name=name: jobs[wildcards.folder, name]["resources"]["threads"]
        resources:
            gpu=lambda wildcards, name=name: jobs[wildcards.folder, name]["resources"]["gpu"],
            mem_mb=first["resources"]["mem_mb"],
            runtime=first["resources"]["runtime"],
        shell:
            "{papermill} - {log:q} -f {wildcards.folder:q}/{rule}.yaml < {there}/{rule}.ipynb && sync {log:q}"


rule compare:
    input:
        "40_compare.asked.yaml",
        "left_out.json",
        needs=[job["makes"][0] for job in work],  # a notebook makes all of its files or none
    output:
        report["makes"],
    log:
        "40_compare.ipynb",
    threads: report["resources"]["threads"]
    resources:
        gpu=report["resources"]["gpu"],
        mem_mb=report["resources"]["mem_mb"],
        runtime=report["resources"]["runtime"],
    shell:
        "{papermill} - {log:q} -f 40_compare.yaml < {there}/40_compare.ipynb && {to_html} --output report.html {log:q}"
        " && sync {log:q} report.html"


# The same report of whatever is there, after other rules have failed.
use rule compare as what_there_is with:
    input:
        [],
    output:
        [],
