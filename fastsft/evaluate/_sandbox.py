"""Run a program that a model wrote, in a Python of its own that can do little.

It guards against accidents (endless loops, eaten memory, a file overwritten), not against attackers: a program that
means to get out of a Python process will find a way. Run what you distrust in a virtual machine.
"""

from __future__ import annotations

import functools
import inspect
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import IO

NETWORK = {
    "isolated": "the kernel cut the program off from the network",
    "refused": (
        "the kernel did not isolate the network (no namespace could be made here): Python itself refused sockets, "
        "which a program that means to can get around"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use. The interpreter's own start is within them: 0.03 s and 20 MiB."""

    # of the clock, and of the processor
    seconds: float = 3.0
    # of address space
    memory_bytes: int = 256 * 2**20
    # of stdout, of stderr and of every file that it writes
    output_bytes: int = 64 * 2**10
    open_files: int = 32

    def __post_init__(self) -> None:
        for name in ("seconds", "memory_bytes", "output_bytes", "open_files"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` of a sandbox must be above 0: got {getattr(self, name)}.")


@dataclass(frozen=True)
class Finished:
    """What became of a program.

    reason: "ended" by itself and without an error, else "error", "time" or "output". exit_code: negative where a signal
    ended it. network: what kept it from the network, in words.
    """

    reason: str
    output: str
    error: str
    exit_code: int
    network: str

    @property
    def ok(self) -> bool:
        return self.reason == "ended"


def run_program(program: str, limits: Limits | None = None) -> Finished:
    """Run Python source in an empty temporary folder: no arguments, no input, no environment, no network.

    It may not start processes, open sockets, call C libraries or change a file outside its folder; what goes beyond the
    limits is ended. Costs a start of the interpreter, about 0.03 s.
    """
    limits = Limits() if limits is None else limits
    with (
        tempfile.TemporaryDirectory(prefix="fastsft-sandbox-") as folder,
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as error,
    ):
        code, in_time = _run(program, limits, folder, output, error)
        printed, said = _read(output), _read(error)
    # the first line of stderr is written before any line of the program runs
    network, _, message = said.decode("utf-8", "replace").partition("\n")
    if network not in NETWORK:
        raise RuntimeError(f"the sandbox could not be set up, exit code {code}: {(network + message)[-500:]!r}.")
    full = max(len(printed), len(said)) >= limits.output_bytes
    late = not in_time or code == -signal.SIGXCPU
    reason = "time" if late else "output" if full else "error" if code else "ended"
    return Finished(reason, printed.decode("utf-8", "replace"), message, code, NETWORK[network])


def _run(program: str, limits: Limits, folder: str, output: IO[bytes], error: IO[bytes]) -> tuple[int, bool]:
    """Start the child, hand it the program, and wait as long as allowed -> exit code, whether it ended in time."""
    numbers = (limits.seconds, limits.memory_bytes, limits.output_bytes, limits.open_files)
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-c", _opening(), *map(str, numbers)],
        stdin=subprocess.PIPE,
        stdout=output,  # files, not pipes: the limit on a file's size caps them
        stderr=error,
        cwd=folder,
        env={},
        start_new_session=True,
    )
    in_time = True
    try:
        child.communicate(program.encode("utf-8", "replace"), timeout=limits.seconds)
    except subprocess.TimeoutExpired:
        in_time = False
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return child.returncode, in_time


def _read(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


@functools.cache
def _opening() -> str:
    """What the child runs first: the three functions below as text. They import what they need, nothing of fastsft."""
    return "".join(inspect.getsource(function) for function in (_limit, _guard, _inside)) + "_inside()\n"


def _limit(seconds: float, memory: float, size: float, files: float) -> bool:
    """Leave the network and take on the limits -> whether the kernel gave a network namespace of its own."""
    import ctypes
    import math
    import resource

    # whoever may make a namespace does, and anybody may inside a user namespace, where the kernel allows those
    new_user, new_network = 0x10000000, 0x40000000
    unshare = getattr(ctypes.CDLL(None), "unshare", None)
    isolated = unshare is not None and 0 in (unshare(new_user | new_network), unshare(new_network))
    processor = math.ceil(seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (processor, processor + 1))
    for limit, most in (
        (resource.RLIMIT_AS, int(memory)),
        (resource.RLIMIT_FSIZE, int(size)),
        (resource.RLIMIT_NOFILE, int(files)),
        (resource.RLIMIT_NPROC, 0),  # means nothing to root: the guard does
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (most, most))
    return isolated


def _guard() -> None:
    """Have Python itself refuse sockets, processes, C libraries, and changes outside the present folder."""
    import os
    import sys

    home = os.path.realpath(".") + os.sep
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    rooms = ("socket.", "subprocess.", "ctypes.", "resource.", "sqlite3.", "pty.")
    processes = ("os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.kill")
    verbs = ("remove", "rename", "rmdir", "mkdir", "link", "symlink", "chmod", "chown", "truncate", "utime")
    changing = tuple(f"os.{verb}" for verb in verbs)

    def hook(event: str, values: tuple) -> None:
        if event.startswith((*rooms, *processes)):
            raise PermissionError(f"the sandbox refuses {event}")
        if event == "open":
            paths = values[:1] if values[2] & writing else ()
        else:
            paths = values[:2] if event in changing or event.startswith("shutil.") else ()
        for path in paths:
            if isinstance(path, str | bytes) and not (os.path.realpath(os.fsdecode(path)) + os.sep).startswith(home):
                raise PermissionError(f"the sandbox refuses to change {path!r}, which is outside its folder")

    sys.addaudithook(hook)


def _inside() -> None:
    """Shut the doors, say how well, and run the program that stands on stdin."""
    import sys

    isolated = _limit(*(float(word) for word in sys.argv[1:]))
    _guard()
    sys.argv[:] = [""]
    program = sys.stdin.buffer.read().decode()
    sys.stderr.write("isolated\n" if isolated else "refused\n")
    sys.stderr.flush()
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
