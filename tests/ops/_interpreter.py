"""Run a file of tests in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path


def assert_passes_in_the_interpreter(name):
    """Run tests/ops/NAME in a process of its own: TRITON_INTERPRET is read where a kernel is defined, and would stay
    for later tests."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).parent / name)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout
    assert "skipped" not in result.stdout
