"""What the tests of operators share."""

import pytest

from fastsft import _native, ops


def isas():
    return _native.module().isa_names() if _native.why_absent() is None else ["base"]


@pytest.fixture(params=isas())
def isa(request):
    """Each instruction set this machine runs."""
    if _native.why_absent():
        pytest.skip(_native.why_absent())
    before = _native.module().isa()
    _native.module().set_isa(request.param)
    with ops.backend("cpp"):
        yield request.param
    _native.module().set_isa(before)
