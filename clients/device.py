"""What a device can say of itself, and when it holds back."""

import resource
import sys
import time
from collections.abc import Callable

import psutil

from fleet.errors import ConfigError

# Names under which Linux has the processor's sensor: Raspberry Pi and other boards, Intel, AMD.
_PROCESSORS = ("cpu_thermal", "cpu-thermal", "soc_thermal", "coretemp", "k10temp", "zenpower")

COOLER = 5.0  # °C below the soft temperature at which training goes on
_LOOK_SECONDS = 1.0  # between two looks at the sensors


def device_metrics() -> dict[str, int | float]:
    """Memory, load and temperature now; what the device cannot tell is left out.

    Returns:
        resident-peak-bytes: the most that this process has had resident.
        available-bytes: memory that new work could have.
        cpu-percent: of all cores, since the last call.
        temperature-celsius: `temperature()`.
        battery-percent: charge left.
    """
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    metrics: dict[str, int | float] = {
        "resident-peak-bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "available-bytes": psutil.virtual_memory().available,
        "cpu-percent": psutil.cpu_percent(),
    }
    degrees = temperature()
    if degrees is not None:
        metrics["temperature-celsius"] = degrees
    battery = _battery()
    if battery is not None:
        metrics["battery-percent"] = battery.percent
    return metrics


def temperature() -> float | None:
    """°C of the processor's hottest sensor, of the hottest of all where none is known as its.

    None: this device has no sensors that can be read.
    """
    sensors = getattr(psutil, "sensors_temperatures", dict)()
    names = [name for name in _PROCESSORS if name in sensors] or list(sensors)
    degrees = [reading.current for name in names for reading in sensors[name]]
    return max(degrees, default=None)


def check_battery(least_percent: float) -> None:
    """Decline to train on a battery that is nearly empty.

    Args:
        least_percent: of charge; 0 never declines.

    Raises:
        ConfigError: if there is a battery below it that is not charging.
    """
    battery = _battery()
    if battery is None or battery.power_plugged is not False:  # None: it cannot be told
        return
    if battery.percent < least_percent:
        raise ConfigError(
            f"this device declines to train: its battery is at {battery.percent:.0f} %, below "
            f"least-battery {least_percent:g} %, and not charging; plug it in, or lower "
            f"least-battery"
        )


class Cooling:
    """Called between batches: at the soft temperature it waits until the device is cooler.

    Args:
        soft: °C; 0 never waits.
        seconds: that the round lasts, counted from now.
        read: °C, or None where there is no sensor.

    Attributes:
        paused_seconds: waited so far.
    """

    def __init__(
        self,
        soft: float,
        seconds: float,
        read: Callable[[], float | None] = temperature,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._soft, self._read, self._sleep, self._clock = soft, read, sleep, clock
        self._seconds, self._end = seconds, clock() + seconds
        self._next_look = -float("inf")
        self.paused_seconds = 0.0

    def __call__(self) -> None:
        """Wait if need be.

        Raises:
            ConfigError: if the device is still too hot when the round is over.
        """
        if not self._soft or self._clock() < self._next_look:
            return
        degrees = self._read()
        if degrees is not None and degrees >= self._soft:
            self._pause(degrees)
        self._next_look = self._clock() + _LOOK_SECONDS

    def metrics(self) -> dict[str, float]:
        """Seconds paused, of a device that would pause and can tell its temperature."""
        if not self._soft or self._read() is None:
            return {}
        return {"paused-seconds": round(self.paused_seconds, 3)}

    def _pause(self, degrees: float) -> None:
        began = self._clock()
        while degrees is not None and degrees > self._soft - COOLER:
            left = self._end - self._clock()
            if left <= 0:
                raise ConfigError(
                    f"this device was at {degrees:.0f} °C, and did not cool to "
                    f"{self._soft - COOLER:g} °C before the round's {self._seconds:g} s were over; "
                    f"cool it, or raise soft-temperature ({self._soft:g} °C)"
                )
            self._sleep(min(_LOOK_SECONDS, left))
            degrees = self._read()
        self.paused_seconds += self._clock() - began


def _battery() -> "psutil._common.sbattery | None":
    return getattr(psutil, "sensors_battery", lambda: None)()
