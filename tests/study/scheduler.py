"""A stand-in for a cluster's scheduler, for Snakemake's executor cluster-generic: real processes, a few at a time.

submit, status and cancel are what Snakemake calls; `serve` is the cluster. It loses a node: the first training that has
a checkpoint is killed with all its children. And it is late: a job's end is told seconds after it.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

NODES, LATE = 2, 2.0  # jobs at a time; seconds
PROPERTIES = "# properties = "  # what Snakemake says of a job, in its script


def submit(queue, script):
    number = 1 + sum(1 for _ in queue.glob("*.job"))
    while True:
        try:
            (queue / f"{number}.job").touch(exist_ok=False)
            break
        except FileExistsError:
            number += 1
    asked = next(line for line in Path(script).read_text().splitlines() if line.startswith(PROPERTIES))
    (queue / f"{number}.asked").write_text(asked.removeprefix(PROPERTIES))
    (queue / f"{number}.script").write_text(script)
    print(number)


def status(queue, number):
    ended = queue / f"{number}.ended"
    late = ended.exists() and time.time() - ended.stat().st_mtime < LATE
    print(ended.read_text() if ended.exists() and not late else "running")


def cancel(queue, *numbers):
    for number in numbers:
        (queue / f"{number}.cancel").touch()


def end(process):
    """Kill a job and all that it started."""
    import psutil

    for child in [*psutil.Process(process.pid).children(recursive=True), process]:
        child.kill()
    process.wait()


def lost(queue, runs, script):
    """Whether it is time that this job's node dies."""
    if (queue / "lost").exists():  # and who gave up a job may have removed its script
        return False
    told = Path(script).read_text()
    begun = [path.parent for path in Path(runs).glob("*/*/*/seed*/checkpoint.pt")]
    return any(f"{'/'.join(folder.parts[-3:])}/10_train" in told for folder in begun)


def serve(queue, runs):
    running = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        while True:
            waiting = sorted(queue.glob("*.script"), key=lambda path: int(path.stem))
            for path in waiting[: NODES - len(running)]:
                script = path.read_text()
                path.rename(path.with_suffix(".started"))
                with open(queue / f"{path.stem}.out", "w") as out:
                    job = subprocess.Popen(["sh", script], stdout=out, stderr=out, start_new_session=True)
                running[path.stem] = job, script
            for number, (job, script) in list(running.items()):
                dies = lost(queue, runs, script)
                if dies:
                    (queue / "lost").write_text(number)
                if dies or (queue / f"{number}.cancel").exists():
                    end(job)
                if job.poll() is not None:
                    (queue / f"{number}.ended").write_text("success" if job.returncode == 0 else "failed")
                    del running[number]
            time.sleep(0.1)
    finally:
        for job, _ in running.values():
            end(job)


if __name__ == "__main__":
    {"submit": submit, "status": status, "cancel": cancel, "serve": serve}[sys.argv[2]](
        Path(sys.argv[1]), *sys.argv[3:]
    )
