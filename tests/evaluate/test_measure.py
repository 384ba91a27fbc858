"""Measuring: which retrainings are asked for, and what becomes of their results."""

import shutil

import pytest
import torch

from fastsft.evaluate import EvaluationError, leave_source_out, measure_truth
from fastsft.evaluate.measure import Plan


def quiet(line):
    pass


def test_a_truth_holds_the_retrainings_that_were_asked_for(tiny_run, linear_retraining, tmp_path):
    asked, effect, every = linear_retraining
    truth = measure_truth(tiny_run, out=tmp_path, subsets=5, seeds=2, queries_per_target=4, say=quiet)
    assert asked[:4] == ["full-0", "full-1", "subset-000-0", "subset-001-0"]
    assert asked[-1] == "subset-004-1"
    assert list(truth.ids) == every
    assert truth.sources[0] == "apples"
    assert truth.abilities == ["code"] * 4 + ["maths"] * 4
    for m in (0, 4):
        kept = [id for id, is_in in zip(every, truth.subsets[m].tolist(), strict=True) if is_in]
        assert len(kept) == 18
        for s in range(2):
            # the run's own seed is 3
            expected = [3 - sum(effect(id, q) for id in kept) + 0.001 * (3 + s) for q in range(8)]
            assert truth.losses[m, s].tolist() == pytest.approx(expected)
    whole = 3 - sum(effect(id, 0) for id in every)
    assert truth.full[:, 0].tolist() == pytest.approx([whole + 0.003, whole + 0.004])
    assert truth.base.tolist() == [3.0] * 8


def test_it_is_taken_up_again_while_it_holds_what_is_asked(tiny_run, linear_retraining, tmp_path):
    asked, _, _ = linear_retraining
    options = {"out": tmp_path, "queries_per_target": 4, "say": quiet}
    one = measure_truth(tiny_run, subsets=5, seeds=2, **options)
    del asked[:]
    fewer = measure_truth(tiny_run, subsets=3, seeds=1, **options)
    assert asked == []
    assert torch.equal(fewer.losses, one.losses)
    more = measure_truth(tiny_run, subsets=6, seeds=2, **options)
    assert torch.equal(more.subsets[:5], one.subsets)
    assert len(asked) == 2 + 12
    del asked[:]
    measure_truth(tiny_run, subsets=6, seeds=2, share=0.25, **options)
    assert len(asked) == 14


def test_what_the_deadline_left_out_is_missing(tiny_run, linear_retraining, tmp_path):
    options = {"out": tmp_path, "subsets": 5, "seeds": 2, "queries_per_target": 4, "say": quiet}
    truth = measure_truth(tiny_run, deadline=0.0, **options)
    assert truth.losses[:, 1].isnan().all()
    assert truth.full[1].isnan().all()
    assert truth.known.all()
    torch.testing.assert_close(truth.mean_losses(), truth.losses[:, 0])
    assert not measure_truth(tiny_run, **options).losses.isnan().any()


def test_leaving_out_a_source(tiny_run, linear_retraining, tmp_path):
    _, effect, every = linear_retraining
    truth = leave_source_out(tiny_run, out=tmp_path, seeds=1, queries_per_target=4, say=quiet)
    assert truth.about["left_out"] == ["apples", "bricks", "clouds"]
    assert truth.subsets.sum(1).tolist() == [24, 24, 24]
    lost = [sum(effect(id, 2) for id in every if id.startswith(source)) for source in truth.about["left_out"]]
    assert (truth.losses[:, 0, 2] - truth.full[0, 2]).tolist() == pytest.approx(lost)
    assert (tmp_path / "sources.npz").exists()
    assert truth.grouped().losses.shape == (3, 1, 2)


def test_a_truth_depends_on_the_base_weights_and_scores_on_the_trained_ones_too(tiny_run, tmp_path):
    shutil.copytree(tiny_run.parent, tmp_path / "copy")
    run = tmp_path / "copy/out"

    def digests():
        plan = Plan.of(run, 4, tmp_path / "copy")
        assert plan.job(None, 0)["digest"] == plan.digest
        return plan.digest, plan.truth_digest(share=0.5), plan.trained_digest

    def change(path):
        path.write_bytes(path.read_bytes() + b" ")

    first = digests()
    assert len(set(first)) == 3
    change(run / "checkpoints/checkpoint-3/adapter_model.safetensors")
    assert digests() == first
    change(run / "checkpoints/checkpoint-6/adapter_model.safetensors")
    trained_anew = digests()
    assert trained_anew[:2] == first[:2]
    assert trained_anew[2] != first[2]
    change(tmp_path / "copy/model/model.safetensors")
    assert not set(digests()) & {*first, *trained_anew}


def test_shares_that_leave_nothing_are_refused(tiny_run, linear_retraining, tmp_path):
    with pytest.raises(EvaluationError, match=r"1\.0 keeps 36"):
        measure_truth(tiny_run, out=tmp_path, share=1.0, say=quiet)
