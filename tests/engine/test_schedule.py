import pytest
import torch

from igla_mega.config.schema import Scheduler, Training
from igla_mega.engine.schedule import learning_rate

PEAK, LOW = 3e-4, 3e-5


def rates(kind="cosine", *, total=100, warmup=10, peak=PEAK, low=LOW) -> list[float]:
    training = Training(learning_rate=peak, min_lr=low)
    scheduler = Scheduler(type=kind)
    return [
        learning_rate(step, training, scheduler, total_steps=total, warmup_steps=warmup) for step in range(total + 1)
    ]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_the_rate_rises_linearly_to_its_peak(kind):
    assert rates(kind)[:10] == pytest.approx([PEAK * (step + 1) / 10 for step in range(10)])


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 1, 10, 99])
def test_min_lr_is_reached_after_the_last_update_and_none_takes_more_than_the_peak_or_rises_after_it(kind, warmup):
    course = rates(kind, warmup=warmup)
    assert course[100] == pytest.approx(LOW) and course[99] > LOW
    assert max(course) <= PEAK * (1 + 1e-12)
    assert all(later <= earlier for earlier, later in zip(course[warmup:], course[warmup + 1 :], strict=False))


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_no_update_of_any_run_has_a_rate_of_zero(kind):
    for total in range(1, 25):
        for warmup in range(total + 1):
            course = rates(kind, total=total, warmup=warmup, low=0.0)[:total]
            assert min(course) > 0 and max(course) == pytest.approx(PEAK), (total, warmup)


def test_halfway_both_shapes_are_halfway():
    # 90 updates after the warm-up: 45 of them are made before step 55.
    assert rates("cosine")[55] == pytest.approx((PEAK + LOW) / 2)
    assert rates("linear")[55] == pytest.approx((PEAK + LOW) / 2)


def test_constant_stays_at_the_peak():
    assert set(rates("constant")[10:]) == {PEAK}


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_beyond_the_last_step_the_rate_stays_at_min_lr(kind):
    training, scheduler = Training(learning_rate=PEAK, min_lr=LOW), Scheduler(type=kind)
    assert learning_rate(500, training, scheduler, total_steps=100, warmup_steps=10) == pytest.approx(LOW)


def test_a_run_that_is_all_warm_up_ends_at_the_peak():
    assert rates(total=10, warmup=10)[9] == pytest.approx(PEAK)


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (100, 0), (100, 20), (37, 5)])
@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_course_is_that_of_transformers_after_a_warm_up_that_is_one_update_ahead(kind, total, warmup):
    transformers = pytest.importorskip("transformers")
    make = {
        "cosine": transformers.get_cosine_schedule_with_warmup,
        "linear": transformers.get_linear_schedule_with_warmup,
    }[kind]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = make(optimizer, num_warmup_steps=warmup, num_training_steps=total)
    theirs = []
    for _ in range(total):
        theirs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    ours = rates(kind, total=total, warmup=warmup, low=0.0)[:total]
    assert ours[warmup:] == pytest.approx(theirs[warmup:], abs=1e-12)
    # Theirs gives the first update of a warm-up a rate of 0.
    assert ours[:warmup] == pytest.approx(theirs[1 : warmup + 1], abs=1e-12)


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (100, 0), (37, 5)])
@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_course_after_the_warm_up_is_megatron_s(kind, total, warmup):
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = OptimizerParamScheduler(
        optimizer, 0.0, PEAK, LOW, warmup, total, kind, start_wd=0.0, end_wd=0.0, wd_incr_steps=0,
        wd_incr_style="constant", use_checkpoint_opt_param_scheduler=False,
    )  # fmt: skip
    theirs = []
    for _ in range(total):
        theirs.append(optimizer.param_groups[0]["lr"])
        schedule.step(1)
    assert rates(kind, total=total, warmup=warmup)[warmup:total] == pytest.approx(theirs[warmup:], abs=1e-12)
