"""`fmsam-register`: `register` from the command line."""

import argparse
import re
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch

from fmsam_lib.checking import ConfigError, read
from fmsam_lib.images.files import read_values
from fmsam_lib.metrics import percent
from fmsam_lib.model.weights import load
from fmsam_lib.parameters import Register, Registering
from fmsam_lib.registration import apply
from fmsam_lib.registration.folder import ROLES, staged
from fmsam_lib.registration.register import register

REQUIRED = ("fixed", "moving", "out")


def main(argv: list[str] | None = None) -> int:
    """`fmsam-register`: 0 when the results are in the folder, 1 when something was wrong, 2 for wrong arguments."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["apply"]:
        return apply.main(argv[1:])
    run, device, quiet = _arguments(argv)
    if run.threads:
        torch.set_num_threads(run.threads)
    files: dict[str, Any] = {role: getattr(run, role) for role in ROLES if getattr(run, role)}
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a cluster's time limit: leave as after Ctrl-C
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
        try:
            with staged(run.out, files.values()) as staging:  # before the work: is there a place for its results?
                for path in files.values():  # before the weights, which may have to be downloaded
                    read_values(path, 2)
                net, options = load(run.weights).to(device), run.model_dump(include=set(Registering.model_fields))
                result = register(**files, net=net, progress=not quiet, **options)
                result.summary["network"]["weights"] = run.weights
                result.write(staging)
        except KeyboardInterrupt:
            print("interrupted: nothing was written", file=sys.stderr)
            return 130
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except (MemoryError, RuntimeError) as error:
            if not re.search("[mM]emory|alloc", repr(error)):
                raise
            print("error: not enough memory: a smaller --shape needs less, and so does --io 0", file=sys.stderr)
            return 1
        finally:
            signal.signal(signal.SIGTERM, before)
    if not quiet:
        print(report(result.summary, run.out))
    return 0


def _arguments(argv: list[str] | None) -> tuple[Register, str, bool]:
    """What to register, on which device, and whether quietly; help, defaults and limits are those of the parameters."""
    parser = argparse.ArgumentParser(
        prog="fmsam-register",
        description="Register two images; the warped image and the transform come out in the fixed image's space.",
        epilog="fmsam-register apply --help: move other images, labels and points by a transform found before",
    )
    for name, field in sorted(Register.model_fields.items(), key=lambda item: item[0] not in REQUIRED):
        default = "" if field.default in ("", []) else " (default: %(default)s)"
        how = {"default": field.default, "required": name in REQUIRED, "help": f"{field.description}{default}"}
        parser.add_argument(_flag(name), **how, **_kind(field.annotation))
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0], help="where to run (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but problems")
    values = vars(parser.parse_args(argv))
    device, quiet = values.pop("device"), values.pop("quiet")
    try:
        return read(Register, values), device, quiet
    except ConfigError as error:
        problems = str(error).split("\n- ")[1:]
        parser.error("\n".join(re.sub(r"^\w+", lambda name: _flag(name[0]), problem) for problem in problems))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _kind(annotation: Any) -> dict[str, Any]:
    """How argparse reads a field: one of several words, several whole numbers, or one value."""
    if get_origin(annotation) is Literal:
        return {"choices": [word for word in get_args(annotation) if word]}
    return {"nargs": "+", "type": int} if get_origin(annotation) is list else {"type": annotation}


def report(summary: dict[str, Any], folder: str | Path) -> str:
    """What a person wants to know of a `Registration.summary`, in a few lines."""
    similarity = "LNCC {before:.3f} -> {after:.3f}".format(**summary["similarity"])
    regularity = f"{percent(summary['folding_percent'])} folded, SDlogJ {summary['sdlogj']:.3f}"
    lines = [f"{similarity}, {regularity}, {summary['seconds']:.1f} s"]
    if io := summary.get("instance_optimisation"):
        best = "best of {steps} steps was {best_step}, loss {loss_before:.4f} -> {loss_best:.4f}"
        lines.append("instance optimisation: " + best.format(**io))
    for label, value in summary.get("dice", {}).items():
        lines.append(f"Dice of label {label}: {value['before']:.3f} -> {value['after']:.3f}")
    return "\n".join([*lines, *(str(Path(folder) / name) for name in summary["files"])])


if __name__ == "__main__":
    sys.exit(main())
