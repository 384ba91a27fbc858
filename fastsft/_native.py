"""The way to fastsft._C, the compiled CPU kernels: loaded at the first use, never at `import fastsft`."""

import importlib
from functools import cache
from types import ModuleType

ABI_VERSION = 3


@cache
def why_absent() -> str | None:
    """Say why the native module cannot be used, or None where it can."""
    try:
        module = importlib.import_module("fastsft._C")
    except ImportError as error:
        return (
            f"fastsft._C could not be imported ({error}). An unbuilt checkout has none: run "
            f'`pip install -c constraints.txt -e ".[test]"` or `python setup.py build_ext --inplace` in its root.'
        )
    built = module.abi_version()
    if built != ABI_VERSION:
        return f"fastsft._C was built with ABI {built}, and this fastsft needs {ABI_VERSION}: build it again."
    return None


def module() -> ModuleType:
    """Return fastsft._C, or raise ImportError with the reason and the way out."""
    reason = why_absent()
    if reason is not None:
        raise ImportError(reason)
    return importlib.import_module("fastsft._C")
