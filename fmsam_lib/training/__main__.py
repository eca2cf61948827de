"""One of several processes of a training, started by torchrun with its parameters as JSON (`distributed.launch`)."""

import os
import sys
import threading

import torch

from fmsam_lib.images.domains import open_domain
from fmsam_lib.parameters import Train
from fmsam_lib.training.loop import device_of, fit, starting


def ends_with_launcher() -> None:
    """Ends the process with its standard input, whose other end `launch` holds."""
    os.read(0, 1)  # sys.stdin would not let the interpreter end
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=ends_with_launcher, daemon=True).start()
    run = Train.model_validate_json(sys.argv[1])
    if on_gpu := device_of(run).type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    dataset = open_domain(run.train_domain, shape=run.shape, data=run.data or None, subjects=run.subjects)
    fit(starting(run), dataset, run)
    torch.distributed.destroy_process_group()
