"""Alerts: loss jumps and stalls, once each, and nothing else."""

from shoestring.trainer.telemetry.alerts import AlertMonitor


def looks(watch: AlertMonitor, losses: list[float], rates: list[float]) -> list[str]:
    return [about for loss, rate in zip(losses, rates, strict=True) for about, _ in watch.check_logged_step(loss, rate)]


def test_a_falling_loss_with_its_noise_and_a_steady_rate_are_no_trouble() -> None:
    losses = [6.2 - 0.05 * step + 0.2 * (step % 3) for step in range(60)]
    assert looks(AlertMonitor(), losses, [1000 + 100 * (step % 4) for step in range(60)]) == []


def test_a_jump_is_reported_once_until_it_is_over() -> None:
    watch = AlertMonitor()
    steady = [3.0 + 0.01 * (step % 2) for step in range(10)]
    assert looks(watch, steady, [100.0] * 10) == []
    ((about, text),) = watch.check_logged_step(4.2, 100.0)
    assert about == "spike"
    assert "4.200" in text
    assert "3.0" in text
    assert looks(watch, [4.5, float("nan")], [100.0] * 2) == []
    assert looks(watch, [3.0, 4.0], [100.0] * 2) == ["spike"]


def test_a_stall_is_reported_and_does_not_become_what_is_usual() -> None:
    watch = AlertMonitor()
    assert looks(watch, [3.0] * 10, [100.0] * 10) == []
    assert looks(watch, [3.0] * 30, [40.0] * 30) == ["stall"]
    assert looks(watch, [3.0, 3.0], [90.0, 30.0]) == ["stall"]


def test_a_loss_that_is_not_a_number_is_trouble_from_the_first_step() -> None:
    assert looks(AlertMonitor(), [float("inf")], [100.0]) == ["spike"]
