"""What a device can say of itself."""

import resource
import sys

import psutil


def device_metrics() -> dict[str, int | float]:
    """Memory, load and temperature now; what the device cannot tell is left out.

    Returns:
        resident-peak-bytes: the most that this process has had resident.
        available-bytes: memory that new work could have.
        cpu-percent: of all cores, since the last call.
        temperature-celsius: of the hottest sensor.
        battery-percent: charge left.
    """
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    metrics: dict[str, int | float] = {
        "resident-peak-bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "available-bytes": psutil.virtual_memory().available,
        "cpu-percent": psutil.cpu_percent(),
    }
    sensors = getattr(psutil, "sensors_temperatures", dict)()
    degrees = [reading.current for readings in sensors.values() for reading in readings]
    if degrees:
        metrics["temperature-celsius"] = max(degrees)
    battery = getattr(psutil, "sensors_battery", lambda: None)()
    if battery is not None:
        metrics["battery-percent"] = battery.percent
    return metrics
