"""fastsft/ops/_op.py: the choice of an implementation, and the sentences about it."""

import warnings

import pytest
import torch

from fastsft import _native, ops
from fastsft.ops import _op
from fastsft.ops._op import Implementation, Op


@pytest.fixture
def make_op(monkeypatch):
    """An operator that answers with the name of what ran; it leaves no trace in the registry."""
    monkeypatch.setattr(_op, "_OPS", {})
    _op._warn_once.cache_clear()

    def make(why_absent=None, note="", by_name=False):
        fast = Implementation(
            backend="cpp",
            device="cpu",
            run=lambda x: "cpp",
            why_absent=lambda: why_absent,
            note=note,
            by_name=by_name,
        )
        return Op("probe", lambda x: "reference", [fast])

    return make


def run(op, x):
    return op(x, like=x)


def test_prefers_the_faster_implementation(make_op):
    assert run(make_op(), torch.ones(1)) == "cpp"


def test_float64_takes_the_reference_without_a_word(make_op):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(make_op(), torch.ones(1, dtype=torch.float64)) == "reference"


def test_absence_is_said_once_with_its_reason(make_op):
    op = make_op(why_absent="nobody built it.")
    with pytest.warns(RuntimeWarning, match=r"probe on cpu takes its plain torch reference. cpp: nobody built it\."):
        assert run(op, torch.ones(1)) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(op, torch.ones(1)) == "reference"


def test_asked_for_by_name_runs_or_fails(make_op):
    with ops.backend("cpp"):
        assert run(make_op(), torch.ones(1)) == "cpp"
        with pytest.raises(RuntimeError, match=r"backend 'cpp', but cpp: nobody built it\."):
            run(make_op(why_absent="nobody built it."), torch.ones(1))
        with pytest.raises(RuntimeError, match="inputs are float64"):
            run(make_op(), torch.ones(1, dtype=torch.float64))
    with ops.backend("triton"), pytest.raises(RuntimeError, match="there is none for device 'cpu'"):
        run(make_op(), torch.ones(1))


def test_by_name_alone_runs_where_it_is_asked_for_and_is_not_missed_elsewhere(make_op):
    op = make_op(by_name=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(op, torch.ones(1)) == "reference"
    with ops.backend("cpp"):
        assert run(op, torch.ones(1)) == "cpp"


def test_asking_ends_with_the_block(make_op):
    with ops.backend("cpp"), ops.backend("reference"):
        assert run(make_op(), torch.ones(1)) == "reference"
        assert _op.is_asked_for("reference")
        assert not _op.is_asked_for("cpp")
    assert run(make_op(why_absent=None), torch.ones(1)) == "cpp"
    assert _op._asked is None
    assert not any(_op.is_asked_for(name) for name in _op.BACKENDS)


def test_unknown_backend_is_a_sentence():
    with pytest.raises(ValueError, match="reference, cpp, triton, cuda: got 'fortran'"), ops.backend("fortran"):
        pass


def test_report_says_ok_or_why(make_op):
    assert make_op(note="half of it").report()["cpu/cpp"] == "ok (half of it)"
    assert make_op(why_absent="nobody built it.").report()["cpu/cpp"] == "nobody built it."


def test_every_line_of_the_report_is_a_sentence_or_ok():
    report = ops.backends()
    assert {"influence_dot", "influence_dot_tokens", "segment_sum"} <= set(report)
    for rows in report.values():
        for status in rows.values():
            assert status == "ok" or status.startswith("ok (") or status.endswith(".")
    if _native.why_absent() is None:
        assert report["influence_dot"]["cpu/cpp"] == "ok"
