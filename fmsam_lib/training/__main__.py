"""One of several processes of a training, started by torchrun with its parameters as JSON (`distributed.launch`)."""

import json
import sys

from fmsam_lib.images.domains import open_domain
from fmsam_lib.parameters import Train
from fmsam_lib.training import distributed as parallel
from fmsam_lib.training.loop import device_of, fit, starting

if __name__ == "__main__":
    run = Train(**json.loads(sys.argv[1]))
    with parallel.group(device_of(run)):
        fit(starting(run), open_domain(run.train_domain, shape=run.shape, data=run.data or None), run)
