import resource
from types import SimpleNamespace

import psutil
import pytest

from clients.device import Cooling, check_battery, device_metrics, temperature
from fleet.errors import ConfigError

ALWAYS = {"resident-peak-bytes", "available-bytes", "cpu-percent"}


@pytest.fixture
def without_sensors(monkeypatch):
    monkeypatch.setattr(psutil, "sensors_temperatures", dict, raising=False)
    monkeypatch.setattr(psutil, "sensors_battery", lambda: None, raising=False)


def test_memory_is_what_the_system_says(without_sensors):
    metrics = device_metrics()
    memory = psutil.virtual_memory()
    assert metrics.keys() == ALWAYS
    assert abs(metrics["available-bytes"] - memory.available) < 0.2 * memory.total
    assert 0.9 * psutil.Process().memory_info().rss < metrics["resident-peak-bytes"] < memory.total
    assert 0 <= metrics["cpu-percent"] <= 100


def test_peak_memory_counts_kib_on_linux_and_bytes_on_macos(without_sensors, monkeypatch):
    usage = SimpleNamespace(ru_maxrss=5000)
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    for platform, expected in (("linux", 5000 * 1024), ("darwin", 5000)):
        monkeypatch.setattr("sys.platform", platform)
        assert device_metrics()["resident-peak-bytes"] == expected


def test_the_hottest_sensor_counts(without_sensors, monkeypatch):
    readings = {
        "cpu": [SimpleNamespace(current=41.0), SimpleNamespace(current=63.5)],
        "disk": [SimpleNamespace(current=30.0)],
    }
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: readings)
    assert device_metrics()["temperature-celsius"] == 63.5


def test_a_battery_counts(without_sensors, monkeypatch):
    monkeypatch.setattr(psutil, "sensors_battery", lambda: SimpleNamespace(percent=80.0))
    assert device_metrics()["battery-percent"] == 80.0


def test_a_system_without_sensors_leaves_them_out(monkeypatch):
    monkeypatch.delattr(psutil, "sensors_temperatures", raising=False)
    monkeypatch.delattr(psutil, "sensors_battery", raising=False)
    assert device_metrics().keys() == ALWAYS


def test_metrics_are_plain_numbers():
    assert {type(value) for value in device_metrics().values()} <= {int, float}


def test_the_processors_sensors_count_before_a_hotter_disk(without_sensors, monkeypatch):
    readings = {
        "nvme": [SimpleNamespace(current=82.0)],
        "cpu_thermal": [SimpleNamespace(current=51.0), SimpleNamespace(current=55.0)],
    }
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: readings)
    assert temperature() == 55.0


# A battery


@pytest.mark.parametrize(
    ("percent", "plugged", "least", "trains"),
    [
        (19.0, False, 20.0, False),
        (20.0, False, 20.0, True),
        (5.0, True, 20.0, True),
        (5.0, None, 20.0, True),  # whether it is charging cannot be told
        (5.0, False, 0.0, True),
    ],
)
def test_a_nearly_empty_battery_declines(monkeypatch, percent, plugged, least, trains):
    battery = SimpleNamespace(percent=percent, power_plugged=plugged)
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    if trains:
        check_battery(least)
        return
    text = (
        r"this device declines to train: its battery is at 19 %, below least-battery 20 %, and not "
        r"charging; plug it in, or lower least-battery"
    )
    with pytest.raises(ConfigError, match=text):
        check_battery(least)


def test_a_device_without_battery_trains(without_sensors):
    check_battery(100.0)


# Heat


class Oven:
    """A device whose temperature follows a list, a second a reading; nobody really sleeps."""

    def __init__(self, *degrees):
        self.degrees, self.now, self.slept = list(degrees), 0.0, []

    def read(self):
        return self.degrees.pop(0) if len(self.degrees) > 1 else self.degrees[0]

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds

    def cooling(self, soft=75.0, seconds=600.0):
        return Cooling(soft, seconds, self.read, self.sleep, lambda: self.now)


def test_training_goes_on_below_the_soft_temperature():
    oven = Oven(74.9)
    cooling = oven.cooling()
    cooling()
    assert (oven.slept, cooling.metrics()) == ([], {"paused-seconds": 0.0})


def test_a_hot_device_waits_until_it_is_five_degrees_cooler():
    oven = Oven(75.0, 74.0, 71.0, 70.1, 70.0, 80.0)
    cooling = oven.cooling()
    cooling()
    assert oven.degrees == [80.0]  # it read 70.0 and went on
    assert cooling.paused_seconds == sum(oven.slept) == 4.0


def test_pauses_add_up():
    oven = Oven(76.0, 60.0, 76.0, 60.0, 60.0)
    cooling = oven.cooling()
    cooling()
    oven.now += 10
    cooling()
    assert cooling.metrics() == {"paused-seconds": 2.0}


def test_sensors_are_not_read_before_every_batch():
    oven = Oven(60.0, 61.0, 62.0, 63.0)
    cooling = oven.cooling()
    for _ in range(5):
        cooling()
    assert len(oven.degrees) == 3
    oven.now += 2
    cooling()
    assert len(oven.degrees) == 2


def test_a_device_that_does_not_cool_gives_the_round_up_with_the_reason():
    oven = Oven(81.0)
    text = (
        r"this device was at 81 °C, and did not cool to 70 °C before the round's 30 s were over; "
        r"cool it, or raise soft-temperature \(75 °C\)"
    )
    with pytest.raises(ConfigError, match=text):
        oven.cooling(seconds=30.0)()
    assert oven.now == 30.0


@pytest.mark.parametrize(("degrees", "soft"), [(None, 75.0), (95.0, 0.0)])
def test_without_a_sensor_or_a_limit_it_never_waits(degrees, soft):
    oven = Oven(degrees)
    cooling = oven.cooling(soft)
    cooling()
    assert (oven.slept, cooling.metrics()) == ([], {})


def test_a_sensor_that_falls_silent_ends_the_pause():
    oven = Oven(90.0, None)
    oven.cooling()()
    assert oven.now == 1.0
