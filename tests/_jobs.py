"""Work for the launcher's tests; run as a module it launches, and kills itself after so many results.

`python -m tests._jobs FOLDER JOBS KILL_AFTER`: SIGKILL when KILL_AFTER jobs are told as finished.
"""

import os
import signal
import sys
import time
from pathlib import Path

from fastsft.launch import launch


def square(job):
    """Note that it ran, one file a run, and give the square."""
    folder = Path(job["folder"])
    (folder / f"ran-{job['number']}-{time.time_ns()}").touch()
    if job.get("fails"):
        raise ValueError(f"{job['number']} can't be\nsquared")
    if job.get("dies"):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(job.get("sleeps", 0))
    return {"square": job["number"] ** 2, "process": os.getpid()}


def jobs_of(folder, count, **more):
    return {f"job-{n}": {"number": n, "folder": str(folder), **more} for n in range(count)}


def main(folder, count, kill_after):
    told = []

    def say(line):
        told.append(line)
        if len(told) == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    launch(square, jobs_of(folder, count, sleeps=0.05), folder / "out", processes=2, say=say)


if __name__ == "__main__":
    # under its own name, which the pool's processes can import
    from tests import _jobs

    _jobs.main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
