"""What each notebook of a study reads and writes."""

import json
from pathlib import Path

import yaml

from fmsam_lib.records import written_whole
from fmsam_lib.study.file import Study
from fmsam_lib.study.grid import Run, between_folder, compared, grid, twins


def parameters(study: Study, run: Run | None, root: Path, data: str, study_file: Path) -> dict[str, dict]:
    """What each notebook of `run` takes beyond its defaults, by the notebook's name; None: those of no single run."""
    common = {"test_domains": study.test_domains, "data": data}
    if run is None:
        evaluate = study.evaluate | common | {"shape": study.shape}
        alone = ["none", *(["ants-syn"] if "ants-syn" in study.baselines else [])]
        notebooks = {"none/20_evaluate": evaluate | {"run": "", "out": f"{root}/none", "methods": alone}}
        if "io" in study.baselines:  # takes the network's form and the loss from a run
            of = {"run": f"{root}/{grid(study)[0].folder}", "out": f"{root}/io", "methods": ["io"]}
            notebooks["io/20_evaluate"] = evaluate | of
        for pair in twins(study):
            out = between_folder(pair[0])
            of = dict(zip(("baseline", "treatment"), (f"{root}/{run.folder}" for run in pair), strict=True))
            notebooks[f"{out}/35_between_minima"] = study.between | common | of | {"out": f"{root}/{out}"}
        baseline, treatment = compared(study)
        report = {"study": str(study_file), "folder": str(root), "baseline": baseline, "treatment": treatment}
        return notebooks | {"40_compare": report}
    out = f"{root}/{run.folder}"
    cell = {"train_domain": run.train_domain, "seed": run.seed}
    cell |= study.variants.get(run.optimizer, {"optimizer": run.optimizer})
    methods = ["network", *(["network+io"] if study.evaluate.get("io") else [])]
    evaluate = study.evaluate | common | {"run": out, "out": out, "shape": study.shape, "methods": methods}
    return {
        f"{run.folder}/10_train": study.train | cell | {"out": out, "shape": study.shape, "data": data},
        f"{run.folder}/20_evaluate": evaluate,
        f"{run.folder}/30_loss_landscape": study.landscape | common | {"run": out, "out": out},
    }


def outputs(study: Study) -> list[str]:
    """The files that the notebooks of a study write last, beside the trainings': `report.html` and those it needs."""
    alone = ["none", *(["io"] if "io" in study.baselines else [])]
    runs = [f"{run.folder}/{file}" for run in grid(study) for file in ("results.csv", "landscape.csv")]
    return [
        *(f"{name}/results.csv" for name in alone),
        *runs,
        *(f"{between_folder(a)}/between.csv" for a, _ in twins(study)),
    ]


def plan(study: Study, root: Path, data: str, study_file: Path) -> None:
    """Write every notebook's parameter file; one that says the same already keeps its date."""
    for run in (None, *grid(study)):
        for name, values in parameters(study, run, root, data, study_file).items():
            write_if_new(root / f"{name}.yaml", yaml.safe_dump(values, sort_keys=False))


def write_if_new(path: Path, text: str) -> None:
    """Write a file unless it says the same already, so that its date tells when it last changed."""
    if not path.exists() or path.read_text() != text:
        with written_whole(path) as partial:
            partial.write_text(text)


def failures(study: Study, root: Path) -> list[str]:
    """What went wrong in the study's notebooks, from the errors they hold."""
    found = []
    names = [name for run in (None, *grid(study)) for name in parameters(study, run, root, "", Path())]
    for notebook in (root / f"{name}.ipynb" for name in names):
        cells = json.loads(notebook.read_text())["cells"] if notebook.exists() else []
        errors = [o for cell in cells for o in cell.get("outputs", []) if o["output_type"] == "error"]
        found += [f"{notebook}: {error['ename']}: {error['evalue']}" for error in errors]
    return found
