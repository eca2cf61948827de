"""One of several processes of a training: `python -m fmsam_lib.training`, started by torchrun."""

import json
import sys

from fmsam_lib.images.domains import open_domain
from fmsam_lib.parameters import Train
from fmsam_lib.training import distributed as parallel
from fmsam_lib.training.loop import device_of, starting, train


def main() -> None:
    """One of several processes, started by torchrun with a training's parameters as JSON."""
    run = Train(**json.loads(sys.argv[1]))
    with parallel.group(device_of(run)):
        dataset = open_domain(run.train_domain, shape=tuple(run.shape), data=run.data or None)
        train(starting(run), dataset, run)


if __name__ == "__main__":
    main()
