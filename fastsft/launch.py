"""Many independent jobs on one machine: a pool of processes, results on disk as they come, resumable.

    results = launch("fastsft.evaluate.retrain:retrain", {"full-0": {...}, "full-1": {...}}, "runs/a/evaluate")

Processes are spawned, so a script of yours that calls `launch` does so under `if __name__ == "__main__":`.
A cluster is not handled yet: all jobs run on this machine.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsft.record import write_text

SCHEMA = 1
FINISHED = "finished.jsonl"
Work = Callable[[dict[str, Any]], dict[str, Any]]


class LaunchError(ValueError):
    """Jobs that failed, or results on disk that are of other jobs, with the way out."""


def launch(
    work: str | Work,
    jobs: Mapping[str, Mapping[str, Any]],
    out: str | Path,
    *,
    processes: int = 2,
    threads: int = 1,
    deadline: float | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """Call `work(job)` for every job in a pool of processes -> results by job id, in the order of `jobs`.

    work: "module:function", or a function at the top of a module; it takes and returns what JSON can hold. A process
    handles many jobs, with `threads` torch threads, so what `work` caches is loaded once a process.
    out: each result is one line of out/finished.jsonl, on the disk before the next job starts. Jobs whose id is there
    are not run again; a job that differs from the one finished under its id is refused.
    deadline: a moment of `time.time()`. No job is handed out that would end after it, by the median of those finished;
    what is finished is returned.
    A job that raises does not stop the others: at the end a LaunchError lists the failed ones. What finished is kept.
    """
    if processes < 1 or threads < 1:
        raise LaunchError(f"`processes` and `threads` must be 1 or more: got {processes} and {threads}.")
    name = _name_of(work)
    book = _Book(Path(out), name, say)
    known = book.read(jobs)
    left = {id: dict(job) for id, job in jobs.items() if id not in known}
    if left:
        progress = _Progress(len(jobs), len(known), processes, deadline, say)
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(processes, len(left)), context, _begin, (threads,))
        try:
            known |= _drain(pool, name, left, book, progress)
        finally:
            pool.shutdown(cancel_futures=True)
    return {id: known[id] for id in jobs if id in known}


def _drain(
    pool: ProcessPoolExecutor, name: str, left: dict[str, dict[str, Any]], book: _Book, progress: _Progress
) -> dict[str, dict[str, Any]]:
    """Hand out jobs, as many as there are processes, until none is left or the deadline is near."""
    waiting, running = list(left), dict[Future[tuple[float, dict[str, Any]]], str]()
    found: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    while waiting or running:
        while waiting and len(running) < progress.processes and progress.has_time():
            id = waiting.pop(0)
            running[pool.submit(_work, name, left[id])] = id
        if not running:
            progress.stopped(len(waiting))
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            id = running.pop(future)
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                raise LaunchError(
                    f"a process died during job {id!r} or one beside it: was memory short? {len(found)} results of "
                    f"this call are in {book.path}; call again, with fewer processes if memory was short."
                ) from error
            if error is not None:
                failed[id] = f"{type(error).__name__}: {' '.join(str(error).split())}"
                progress.failed(id, failed[id])
                continue
            seconds, found[id] = future.result()
            book.append(id, left[id], seconds, found[id])
            progress.finished(id, seconds)
    if failed:
        listed = "; ".join(f"{id}: {sentence}" for id, sentence in failed.items())
        raise LaunchError(
            f"{len(failed)} of {len(left)} jobs failed ({listed}). The others are in {book.path}: mend the cause and "
            f"call again, only these will run."
        )
    return found


def _begin(threads: int) -> None:
    """Set up a process of the pool: its torch threads, and an end with its parent's."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:  # by the main module, which a spawned process imports first
        sys.modules["torch"].set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Leave when the parent was killed: a pool's process would wait for its next job for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(name: str, job: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    module, _, function = name.partition(":")
    start = time.perf_counter()
    result = getattr(importlib.import_module(module), function)(job)
    return time.perf_counter() - start, result


def _name_of(work: str | Work) -> str:
    name = work if isinstance(work, str) else f"{work.__module__}:{work.__qualname__}"
    module, colon, function = name.partition(":")
    if not (module and colon and function.isidentifier()) or module == "__main__":
        raise LaunchError(
            f"`work` must be 'module:function' or a function at the top of a module that other processes can import: "
            f"got {name!r}."
        )
    return name


def job_hash(job: Mapping[str, Any]) -> str:
    """Name a job's content by 16 hex digits."""
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class _Book:
    """The file of finished jobs: a header, then one line {id, job, seconds, result} each."""

    out: Path
    work: str
    say: Callable[[str], None]

    @property
    def path(self) -> Path:
        return self.out / FINISHED

    def read(self, jobs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Read the results of `jobs` that are there; start the file where there is none."""
        if not self.path.exists():
            write_text(self.path, json.dumps({"schema": SCHEMA, "work": self.work}) + "\n")
            return {}
        header, *lines = self._lines()
        if header.get("schema") != SCHEMA or header.get("work") != self.work:
            raise LaunchError(
                f"{self.path} holds results of {header.get('work')!r} (schema {header.get('schema')}), not of "
                f"{self.work!r} (schema {SCHEMA}): name another `out`, or delete the file."
            )
        found = {}
        for line in lines:
            if line["id"] in jobs:
                if line["job"] != job_hash(jobs[line["id"]]):
                    raise LaunchError(
                        f"{self.path} holds a result of {line['id']!r} for another job (its hash is {line['job']}, "
                        f"now {job_hash(jobs[line['id']])}): settings or data changed. Name another `out`, or delete "
                        f"the file."
                    )
                found[line["id"]] = line["result"]
        return found

    def _lines(self) -> list[dict[str, Any]]:
        """Read whole lines; a last one that a kill cut off is dropped from the file."""
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            self.say(f"{self.path}: the last line was cut off, so its job runs again.")
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        found = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise LaunchError(
                    f"{self.path} line {number} is not JSON ({error}): the file was damaged; delete that line."
                ) from None
        if not found:
            raise LaunchError(f"{self.path} has no header line: the file was damaged; delete it.")
        return found

    def append(self, id: str, job: Mapping[str, Any], seconds: float, result: Mapping[str, Any]) -> None:
        line = {"id": id, "job": job_hash(job), "seconds": round(seconds, 3), "result": result}
        with self.path.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


@dataclass
class _Progress:
    """Say how far it is, and whether there is time for one more job."""

    total: int
    done: int
    processes: int
    deadline: float | None
    say: Callable[[str], None]
    seconds: list[float] = field(default_factory=list)

    @property
    def typical(self) -> float:
        """The median: the first job of a process also loads what the others find there."""
        return statistics.median(self.seconds) if self.seconds else 0.0

    def has_time(self) -> bool:
        return self.deadline is None or time.time() + self.typical <= self.deadline

    def finished(self, id: str, seconds: float) -> None:
        self.done += 1
        self.seconds.append(seconds)
        left = (self.total - self.done) * self.typical / self.processes
        self.say(f"{self.done} of {self.total}: {id}, {seconds:.1f} s, about {_span(left)} left")

    def failed(self, id: str, sentence: str) -> None:
        self.say(f"failed: {id}, {sentence}")

    def stopped(self, left: int) -> None:
        self.say(f"stopped at the deadline, {left} of {self.total} jobs not run")


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
