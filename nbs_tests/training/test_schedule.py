import mlx.core as mx
import mlx.optimizers as optim
import pytest
import transformers

from fulltune_nb.errors import ConfigError
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.schedule import NEXT, PEAK, SHAPES, final_share, read_rates, spans_the_run
from nbs_tests.models.parity import need_torch


def make_schedule(config, total):
    return config.schedule(total)


def rates(total=20, **settings):
    schedule = make_schedule(TrainConfig(learning_rate=2.0, **settings), total)
    return [schedule(step) for step in range(total + 3)]


@pytest.mark.parametrize("shape", [None, "constant"])
def test_constant_stays(shape):
    assert set(rates(lr_schedule=shape)) == {2.0}


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_linear_and_cosine_fall_from_the_peak_to_zero_and_stay_there(shape):
    found = rates(lr_schedule=shape)
    assert found[0] == 2.0 and found[10] == pytest.approx(1.0) and found[20:] == pytest.approx([0, 0, 0], abs=1e-15)
    assert all(a > b for a, b in zip(found[:20], found[1:21], strict=True))
    assert found[19] > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_warmup_rises_from_above_zero_to_the_peak(shape):
    found = rates(lr_schedule=shape, warmup=4)
    assert found[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert max(found) == 2.0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("total, warmup", [(1, 0), (5, 5), (5, 50), (0, 0)])
def test_short_runs_have_a_schedule_too(shape, total, warmup):
    found = rates(total=total, lr_schedule=shape, warmup=warmup)
    assert all(0 <= rate <= 2.0 for rate in found) and found[0] > 0


def test_the_schedule_is_a_pure_function_of_plain_numbers():
    schedule = make_schedule(TrainConfig(lr_schedule="cosine", warmup=3), 30)
    forward = [schedule(step) for step in range(30)]
    assert [schedule(step) for step in reversed(range(30))] == forward[::-1]
    assert all(type(rate) is float for rate in forward)


THEIRS = {
    "cosine": lambda optimizer, floor: transformers.get_cosine_with_min_lr_schedule_with_warmup(optimizer, 6, 40, min_lr_rate=floor),
    "wsd": lambda optimizer, floor: transformers.get_wsd_schedule(
        optimizer, 6, 10, num_training_steps=40, decay_type="1-sqrt", min_lr_ratio=floor
    ),
    "inverse_sqrt": lambda optimizer, floor: transformers.get_inverse_sqrt_schedule(optimizer, 6),
}


@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("shape", THEIRS)
def test_after_the_warmup_rates_are_those_of_transformers(shape, floor):
    need_torch()
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    theirs = THEIRS[shape](optimizer, floor).lr_lambdas[0]
    found = rates(40, lr_schedule=shape, warmup=6, lr_floor=floor, lr_decay=0.25)
    assert found[6:41] == pytest.approx([2.0 * theirs(step) for step in range(6, 41)], rel=1e-12, abs=1e-15)
    assert shape != "inverse_sqrt" or found[42] == 2.0 * (6 / 42) ** 0.5  # it has no floor


def test_linear_ends_at_its_floor():
    assert rates(lr_schedule="linear", lr_floor=0.25)[::10] == pytest.approx([2.0, 1.25, 0.5])


def test_wsd_stays_until_the_last_share_of_the_steps():
    found = rates(20, lr_schedule="wsd", lr_decay=0.2, warmup=2)
    assert set(found[2:17]) == {2.0} and found[17] < 2.0 and found[20:] == [0, 0, 0]
    assert rates(20, lr_schedule="wsd", lr_decay=1.0)[20] == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_warmup_below_one_is_a_share_of_the_run(shape):
    assert rates(40, lr_schedule=shape, warmup=0.1) == rates(40, lr_schedule=shape, warmup=4)
    assert rates(41, lr_schedule=shape, warmup=0.1) == rates(41, lr_schedule=shape, warmup=5)


def test_a_share_as_warmup_is_kept_as_one_and_serves_mlx_form_too():
    config = TrainConfig(warmup=0.25, lr_schedule={"name": "constant", "arguments": [0.5]})
    assert config.warmup == 0.25 and config.schedule(8)(0) == 0.0 and config.schedule(8)(1) == 0.25
    assert TrainConfig(warmup=1.0).warmup == 1 and type(TrainConfig(warmup=5.0).warmup) is int
    for bad in (-0.1, 1.5, "half", True):
        with pytest.raises(ConfigError, match="warmup"):
            TrainConfig(warmup=bad)


@pytest.mark.parametrize(
    ("settings", "spans"),
    [({}, False), ({"lr_schedule": "inverse_sqrt", "warmup": 5}, False), ({"warmup": 0.1}, True), ({"lr_schedule": "wsd"}, True)],
)
def test_which_schedules_change_with_the_length_of_the_run(settings, spans):
    config = TrainConfig(**settings)
    assert spans_the_run(config.lr_schedule, config.warmup) == spans == (config.schedule(30)(28) != config.schedule(300)(28))


def joined_by_mlx(name, arguments, warmup=0, warmup_init=0.0):
    """The schedule that mlx_lm builds from its YAML form."""
    body = getattr(optim.schedulers, name)(*arguments)
    if not warmup:
        return body
    rise = optim.schedulers.linear_schedule(warmup_init, arguments[0], warmup)
    return optim.schedulers.join_schedules([rise, body], [warmup + 1])


@pytest.mark.parametrize("warmup", [{}, {"warmup": 5, "warmup_init": 1e-7}, {"warmup": 4}])
@pytest.mark.parametrize(
    "name, arguments",
    [
        ("cosine_decay", [1e-5, 20, 1e-7]),
        ("cosine_decay", [1e-5, 20]),
        ("linear_schedule", [1e-5, 1e-6, 15]),
        ("exponential_decay", [1e-3, 0.9]),
        ("step_decay", [1e-3, 0.5, 4]),
    ],
)
def test_named_schedules_have_mlx_values(name, arguments, warmup):
    config = TrainConfig(lr_schedule={"name": name, "arguments": arguments, **warmup})
    ours, theirs = make_schedule(config, 1000), joined_by_mlx(name, arguments, **warmup)
    for step in range(40):
        assert ours(step) == pytest.approx(mx.array(theirs(mx.array(step))).item(), rel=2e-6, abs=1e-12)


def test_constant_by_name():
    schedule = make_schedule(TrainConfig(lr_schedule={"name": "constant", "arguments": [0.5], "warmup": 2}), 10)
    assert [schedule(step) for step in range(4)] == [0.0, 0.25, 0.5, 0.5]


def test_the_settings_own_warmup_serves_a_form_without_one():
    form = {"name": "constant", "arguments": [0.5]}
    schedule = make_schedule(TrainConfig(lr_schedule=form, warmup=2), 10)
    assert [schedule(step) for step in range(4)] == [0.0, 0.25, 0.5, 0.5]


@pytest.mark.parametrize(
    "form, words",
    [
        ({"name": "cosine", "arguments": [1, 2]}, "cosine_decay"),
        ({"name": "Adam", "arguments": [1, 2]}, "Valid names"),
        ({"arguments": [1, 2]}, "name"),
        ({"name": "cosine_decay"}, "arguments"),
        ({"name": "cosine_decay", "arguments": [1e-5]}, "2 to 3"),
        ({"name": "cosine_decay", "arguments": [1e-5, 10, 0, 3]}, "2 to 3"),
        ({"name": "cosine_decay", "arguments": {"init": 1e-5}}, "arguments"),
        ({"name": "cosine_decay", "arguments": "ab"}, "arguments"),
        ({"name": "cosine_decay", "arguments": ["1e-5", 10]}, "number"),
        ({"name": "cosine_decay", "arguments": [1e-5, 10.5]}, "whole number"),
        ({"name": "cosine_decay", "arguments": [1e-5, 0]}, "at least 1"),
        ({"name": "step_decay", "arguments": [1e-5, -1, 2]}, "at least 0"),
        ({"name": "cosine_decay", "arguments": [1e-5, 10], "warm_up": 3}, "warmup"),
        ({"name": "cosine_decay", "arguments": [1e-5, 10], "warmup": "3"}, "whole number"),
        ({"name": "cosine_decay", "arguments": [1e-5, 10], "warmup_init": -1}, "number"),
        ("cosine_decay", "takes arguments"),
        ("cosin", "cosine"),
        (3, "expected one of"),
        (["cosine"], "expected one of"),
    ],
    ids=str,
)
def test_a_wrong_schedule_is_refused(form, words):
    with pytest.raises(ConfigError, match=words) as caught:
        TrainConfig(lr_schedule=form)
    assert str(caught.value).startswith("lr_schedule: ")


def test_two_warmups_that_disagree_are_refused():
    form = {"name": "constant", "arguments": [0.5], "warmup": 3}
    with pytest.raises(ConfigError, match="disagree"):
        TrainConfig(lr_schedule=form, warmup=4)
    assert TrainConfig(lr_schedule=form, warmup=3).warmup == 3


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({}, 1.0),
        ({"warmup": 30}, 1.0),  # still rising at the end: its last rate is its highest
        ({"lr_schedule": "linear"}, 1 / 20),
        ({"lr_schedule": "linear", "warmup": 10}, 1 / 10),
        ({"lr_schedule": {"name": "linear_schedule", "arguments": [0.0, 1e-3, 10]}}, 1.0),
        ({"lr_schedule": {"name": "cosine_decay", "arguments": [1e-3, 10, 2e-4]}}, 0.2),
        ({"lr_schedule": {"name": "constant", "arguments": [0.0]}}, 1.0),
    ],
)
def test_what_is_left_of_the_highest_rate_at_the_end(settings, share):
    assert final_share(make_schedule(TrainConfig(**settings), 20), 20) == pytest.approx(share)
    assert final_share(make_schedule(TrainConfig(**settings), 0), 0) == 1.0  # no step at all: nothing has decayed


def test_rates_set_by_hand_are_read_as_the_version_that_wrote_them_meant_them():
    assert read_rates({"8": 1e-4, "9": ["peak learning rate", 2e-4]}) == {8: (NEXT, 1e-4), 9: (PEAK, 2e-4)}
    for wrong in ([], {"x": 1e-4}, {"8": 0.0}, {"8": ["peak", 1e-4]}, {"8": [PEAK]}, {"8": [PEAK, "1"]}, {"8": None}, {"8": [[], 1e-4]}):
        assert read_rates(wrong) is None, wrong
