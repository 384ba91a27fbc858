"""The sandbox: what programs may not do, and that what they may do comes back as it was printed."""

import time

import pytest

from fastsft.evaluate import _sandbox
from fastsft.evaluate._sandbox import NETWORK, Limits, run_program

QUICK = Limits(seconds=1.0)


def test_a_program_comes_back_with_what_it_printed():
    found = run_program("import math\nprint(math.comb(5, 2), 'é')\nprint('done')")
    assert found.ok
    assert (found.output, found.error, found.exit_code) == ("10 é\ndone\n", "", 0)
    assert found.network in NETWORK.values()


def test_it_sees_no_environment_no_arguments_no_files_and_no_input(monkeypatch):
    monkeypatch.setenv("FASTSFT_SECRET", "treasure")
    found = run_program(
        "import os, sys\n"
        "print('FASTSFT_SECRET' in os.environ, sys.argv, os.listdir('.'), repr(sys.stdin.read()), __name__)\n"
        "print('fastsft' in sys.modules, any('site-packages' in path for path in sys.path))"
    )
    assert found.output == "False [''] [] '' __main__\nFalse False\n"


@pytest.mark.parametrize(
    "program", ["while True: pass", "import time; time.sleep(60)", "print(end='', flush=True)\nwhile True: pass"]
)
def test_an_endless_program_is_ended(program):
    start = time.monotonic()
    found = run_program(program, QUICK)
    assert found.reason == "time"
    assert not found.ok
    assert time.monotonic() - start < 30  # that it ends at all; how fast is the machine's affair


def test_the_processor_time_ends_it_where_the_clock_does_not(monkeypatch):
    inside = _sandbox._opening()
    monkeypatch.setattr(_sandbox, "_opening", lambda: inside.replace("math.ceil(seconds)", "1"))
    found = run_program("while True: pass", Limits(seconds=20.0))
    assert found.reason == "time"
    assert found.exit_code < 0


def test_eaten_memory_is_an_error_of_the_program():
    found = run_program("x = bytearray(10**10)")
    assert found.reason == "error"
    assert "MemoryError" in found.error
    assert run_program("x = bytearray(10**8); print(len(x))").output == "100000000\n"


@pytest.mark.parametrize(
    ("program", "refused"),
    [
        ("import socket; socket.socket()", "socket"),
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "socket"),
        ("import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')", "socket"),
        ("import os; os.fork()", "os.fork"),
        ("import os; os.system('true')", "os.system"),
        ("import os; os.execv('/bin/true', ['true'])", "os.exec"),
        ("import subprocess; subprocess.run(['true'])", "subprocess"),
        ("import multiprocessing as m; m.get_context('fork').Process(target=print).start()", "os.fork"),
        ("import ctypes; ctypes.CDLL('libc.so.6')", "ctypes"),
        ("import os; os.kill(1, 0)", "os.kill"),
        ("import resource; resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))", "resource"),
    ],
)
def test_it_starts_nothing_and_reaches_nothing(program, refused):
    found = run_program(program)
    assert found.reason == "error"
    assert f"the sandbox refuses {refused}" in found.error


def test_the_kernel_itself_has_no_network_where_it_says_so():
    found = run_program("print(open('/proc/net/dev').read())")
    if found.network == NETWORK["refused"]:
        pytest.skip("no network namespace can be made here, and the result says so")
    names = [line.split(":")[0].strip() for line in found.output.splitlines() if ":" in line]
    assert names == ["lo"]


def test_where_the_kernel_gives_no_namespace_sockets_are_still_refused_and_the_result_says_so(monkeypatch):
    inside = _sandbox._opening()
    monkeypatch.setattr(_sandbox, "_opening", lambda: inside.replace('"unshare", None)', '"unshare_", None)'))
    found = run_program("import socket; socket.socket()")
    assert "the sandbox refuses socket" in found.error
    assert found.network == NETWORK["refused"]


@pytest.mark.parametrize(
    "program",
    [
        "open({path!r}, 'w')",
        "open({path!r}, 'a')",
        "import os; os.open({path!r}, os.O_WRONLY)",
        "import pathlib; pathlib.Path({path!r}).write_text('x')",
        "import os; os.remove({path!r})",
        "import os; os.rename({path!r}, 'here')",
        "import os; os.chmod({path!r}, 0)",
        "import os; os.truncate({path!r}, 0)",
        "import shutil; shutil.rmtree({folder!r})",
        "import os; os.symlink({path!r}, 'link'); open('link', 'w')",
    ],
)
def test_files_outside_its_folder_stay_as_they_are(program, tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("kept")
    path.chmod(0o644)
    found = run_program(program.format(path=str(path), folder=str(tmp_path)))
    assert found.reason == "error"
    assert "outside its folder" in found.error
    assert path.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [path]


def test_it_may_write_in_its_own_folder():
    program = "import os\nos.mkdir('a')\nopen('a/b', 'w').write('x')\nos.rename('a/b', 'c')\nprint(open('c').read())"
    assert run_program(program).output == "x\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_big_output_is_cut_and_said(stream):
    limits = Limits(output_bytes=5000)
    found = run_program(f"import sys; sys.{stream}.write('x' * 10**7)", limits)
    assert found.reason == "output"
    assert len(found.output) + len(found.error) <= 2 * 5000
    assert "xxxx" in found.output + found.error


def test_a_big_file_is_refused():
    found = run_program("open('a', 'wb').write(b'x' * 10**7)")
    assert found.reason == "error"
    assert "File too large" in found.error


@pytest.mark.parametrize("program", ["def (", "1 / 0", "import sys; sys.exit(3)", "\x00"])
def test_a_program_that_fails_is_an_error(program):
    assert run_program(program).reason == "error"


def test_a_child_that_cannot_start_is_no_verdict_about_the_program(monkeypatch):
    monkeypatch.setattr(_sandbox, "_opening", lambda: "raise SystemExit('no Python here')")
    with pytest.raises(RuntimeError, match="could not be set up, exit code 1: 'no Python here"):
        run_program("print(1)")


def test_limits_are_checked():
    with pytest.raises(ValueError, match="`seconds` of a sandbox must be above 0: got 0"):
        Limits(seconds=0)
