import resource
from types import SimpleNamespace

import psutil
import pytest

from clients.device import device_metrics

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
