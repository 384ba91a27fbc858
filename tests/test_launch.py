"""Many jobs in a pool: right results under their ids, a kill in the middle, failures, deadlines, changed jobs."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastsft.launch import FINISHED, LaunchError, launch
from tests._jobs import jobs_of, square


def ran(folder):
    """How often each job ran."""
    found = {}
    for path in folder.glob("ran-*"):
        number = int(path.name.split("-")[1])
        found[number] = found.get(number, 0) + 1
    return found


def start(jobs, folder, **given):
    told = []
    results = launch(square, jobs, folder / "out", say=told.append, **given)
    return results, told


def test_every_job_has_its_own_result_and_a_process_takes_many(tmp_path):
    results, told = start(jobs_of(tmp_path, 7), tmp_path, processes=2)
    assert list(results) == [f"job-{n}" for n in range(7)]
    assert [result["square"] for result in results.values()] == [n**2 for n in range(7)]
    assert ran(tmp_path) == dict.fromkeys(range(7), 1)
    assert 1 <= len({result["process"] for result in results.values()}) <= 2
    assert [line.split(":")[0] for line in told] == [f"{n} of 7" for n in range(1, 8)]
    assert told[-1].endswith("about 0 s left")

    again, told = start(jobs_of(tmp_path, 7), tmp_path)
    assert again == results
    assert told == []
    assert ran(tmp_path) == dict.fromkeys(range(7), 1)


def test_killed_in_the_middle_it_goes_on_without_repeating(tmp_path):
    command = [sys.executable, "-m", "tests._jobs", str(tmp_path), "8", "3"]
    killed = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    book = tmp_path / "out" / FINISHED
    whole = book.read_bytes()
    kept = [json.loads(line)["id"] for line in whole.splitlines()[1:]]
    assert len(kept) == 3
    time.sleep(1)  # what was running ends with its parent, or is done
    before = ran(tmp_path)

    book.write_bytes(whole + b'{"id": "job-7", "job": "cut off')
    results, told = start(jobs_of(tmp_path, 8, sleeps=0.05), tmp_path)
    assert [result["square"] for result in results.values()] == [n**2 for n in range(8)]
    assert "cut off" in told[0]
    after = ran(tmp_path)
    for number in range(8):
        again = 0 if f"job-{number}" in kept else 1
        assert after[number] == before.get(number, 0) + again
    lines = [json.loads(line) for line in book.read_bytes().splitlines()]
    assert sorted(line["id"] for line in lines[1:]) == sorted(results)


def test_a_failure_is_told_and_the_others_go_on(tmp_path):
    jobs = jobs_of(tmp_path, 4)
    jobs["job-1"]["fails"] = True
    with pytest.raises(LaunchError, match=r"1 of 4 jobs failed \(job-1: ValueError: 1 can't be squared\)"):
        start(jobs, tmp_path)
    assert ran(tmp_path) == dict.fromkeys(range(4), 1)
    with pytest.raises(LaunchError, match="1 of 1 jobs failed"):
        start(jobs, tmp_path)
    assert ran(tmp_path) == {0: 1, 1: 2, 2: 1, 3: 1}


def test_a_process_that_dies_is_told(tmp_path):
    jobs = jobs_of(tmp_path, 2)
    jobs["job-0"]["dies"] = True
    with pytest.raises(LaunchError, match=r"a process died during job .* was memory short"):
        start(jobs, tmp_path, processes=1)


def test_no_job_is_begun_that_would_end_after_the_deadline(tmp_path):
    jobs = jobs_of(tmp_path, 4, sleeps=0.1)
    results, told = start(jobs, tmp_path, deadline=time.time())
    assert results == {}
    assert told == ["stopped at the deadline, 4 of 4 jobs not run"]
    assert ran(tmp_path) == {}
    # the first is begun, as nothing is known of a job's length; after it no other fits before the deadline
    results, told = start(jobs_of(tmp_path, 4, sleeps=4), tmp_path, processes=1, deadline=time.time() + 6)
    assert list(results) == ["job-0"]
    assert told[-1] == "stopped at the deadline, 3 of 4 jobs not run"


def test_other_jobs_under_the_same_ids_are_refused(tmp_path):
    start(jobs_of(tmp_path, 2), tmp_path)
    with pytest.raises(LaunchError, match=r"result of 'job-[01]' for another job .* settings or data changed"):
        start(jobs_of(tmp_path, 2, sleeps=0.01), tmp_path)
    with pytest.raises(LaunchError, match=r"holds results of 'tests._jobs:square' .* not of 'tests._jobs:other'"):
        launch("tests._jobs:other", jobs_of(tmp_path, 2), tmp_path / "out")
    # more jobs than before are no others
    results, _ = start(jobs_of(tmp_path, 3), tmp_path)
    assert len(results) == 3
    assert ran(tmp_path) == {0: 1, 1: 1, 2: 1}


def test_a_damaged_file_and_bad_arguments_are_refused(tmp_path):
    start(jobs_of(tmp_path, 1), tmp_path)
    book = tmp_path / "out" / FINISHED
    book.write_bytes(book.read_bytes().replace(b'"id"', b'id"', 1))
    with pytest.raises(LaunchError, match="line 2 is not JSON"):
        start(jobs_of(tmp_path, 1), tmp_path)
    book.write_bytes(b"")
    with pytest.raises(LaunchError, match="no header line"):
        start(jobs_of(tmp_path, 1), tmp_path)
    for work in ("square", "__main__:square", lambda job: job):
        with pytest.raises(LaunchError, match="at the top of a module"):
            launch(work, {}, tmp_path)
    with pytest.raises(LaunchError, match="1 or more: got 0 and 1"):
        launch(square, {}, tmp_path, processes=0)
