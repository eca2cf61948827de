"""A study file, found, read and checked."""

from pathlib import Path

import yaml

from fmsam_lib.checking import ConfigError, read
from fmsam_lib.flatness.landscape import TRAINING
from fmsam_lib.parameters import Evaluate, Landscape
from fmsam_lib.records import PROJECT
from fmsam_lib.study.grid import Study, swept
from fmsam_lib.study.notebooks import NOTEBOOKS, jobs


def placed(study: str, runs: Path) -> tuple[Path, Path]:
    """The file of a study, given by its name in `studies/` or by its path, and the folder for its results."""
    by_path = Path(study).suffix in (".yaml", ".yml")
    path = Path(study).resolve() if by_path else PROJECT / "studies" / f"{study}.yaml"
    return path, runs.resolve() / (path.stem if by_path else study)


def read_study(path: Path | str) -> Study:
    """A study file; whatever one of its notebooks would refuse is an error here, before an hour of training.

    Raises ConfigError, which names the file and, of a wrong parameter, section and run.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml"))) or "none"
        raise ConfigError(f"no study file {path}; known studies: {known}") from None
    except (OSError, yaml.YAMLError, UnicodeError) as error:
        raise ConfigError(f"{path} is not valid YAML in UTF-8: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of {', '.join(Study.model_fields)}, got {values!r}")
    study = read(Study, values, source=str(path))
    try:
        study = swept(study)
        work = jobs(study, Path("runs"), "", path)
    except ValueError as error:
        raise ConfigError(f"{path}, {error}") from None
    averaged = {job.folder for job in work if job.values.get("averages")}
    for job in work:
        notebook = NOTEBOOKS[job.notebook]
        source = f"{path}, section {notebook.section}, run {job.folder}"
        given, unfit, fit = read(notebook.takes, job.values, source=source), set[str](), ""
        if isinstance(given, Evaluate) and job.folder not in ("none", "io"):
            other = () if job.folder in averaged else ("+ema", "+tail")
            unfit = {name for name in given.methods if not name.startswith("network") or name.endswith(other)}
            fit = "methods of networks (others are baselines), +ema and +tail with train: {averages: true}"
        elif isinstance(given, Landscape):
            unfit = {*given.measured_on} - {TRAINING, *given.test_domains}
            fit = f"measured_on to name {TRAINING} or test_domains"
        if unfit:
            raise ConfigError(f"{source}: expected {fit}, got {', '.join(sorted(unfit))}")
    return study
