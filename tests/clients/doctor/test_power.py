import pytest

from clients.doctor import readings
from clients.doctor.power import (
    decode_throttled,
    power_finding,
    temperature_finding,
    this_power,
    this_time_sync,
    throttled_bits,
    time_sync_finding,
)
from tests.many import many

# From Raspberry Pi's documentation of `vcgencmd get_throttled`.
DOCUMENTED = {
    0x1: "under-voltage",
    0x2: "frequency capped",
    0x4: "throttled",
    0x8: "soft temperature limit",
}


@many("bits", range(16))
def test_every_combination_of_bits_is_decoded(bits):
    names = [name for bit, name in DOCUMENTED.items() if bits & bit]
    assert decode_throttled(bits) == (names, [])
    assert decode_throttled(bits << 16) == ([], names)
    assert decode_throttled(bits | bits << 16) == (names, [])


@pytest.mark.parametrize(
    ("bits", "state", "fact", "remedies"),
    [
        (0x0, "ok", "no under-voltage, no throttling since the start", ()),
        (
            0x50005,
            "warning",
            "now: under-voltage, throttled (0x50005)",
            ("power supply",),
        ),
        (0x50000, "warning", "since the start: under-voltage, throttled", ("power supply",)),
        (0x80008, "warning", "now: soft temperature limit", ("heat sink",)),
        (
            0xD0008,
            "warning",
            "now: soft temperature limit; since the start: under-voltage, throttled",
            ("power supply", "heat sink"),
        ),
        (None, "unknown", "no Raspberry Pi firmware to ask (vcgencmd get_throttled)", ()),
    ],
)
def test_what_the_firmware_says_names_its_remedies(bits, state, fact, remedies):
    found = power_finding(bits)
    assert found.state == state
    assert found.fact.startswith(fact)
    for remedy in ("power supply", "heat sink"):
        assert (remedy in found.remedy) == (remedy in remedies)


def test_the_kernels_file_serves_where_there_is_no_vcgencmd(tmp_path):
    assert throttled_bits(tmp_path, None) is None
    file = tmp_path / "sys/devices/platform/soc/soc:firmware/get_throttled"
    file.parent.mkdir(parents=True)
    file.write_text("50005\n")
    assert throttled_bits(tmp_path, None) == 0x50005
    assert throttled_bits(tmp_path, "throttled=0x0") == 0
    assert throttled_bits(tmp_path, "VCHI initialization failed") == 0x50005


def test_vcgencmd_is_asked(tmp_path, monkeypatch):
    program(tmp_path / "vcgencmd", '[ "$1" = get_throttled ] && echo throttled=0x50000')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert this_power(tmp_path).fact.endswith("(0x50000)")


@pytest.mark.parametrize(
    ("script", "output"),
    [("echo yes", "yes"), ("echo yes; exit 1", None), ("sleep 60", None)],
)
def test_a_program_that_fails_or_hangs_says_nothing(tmp_path, monkeypatch, script, output):
    program(tmp_path / "ask", script)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert readings.output_of("ask", seconds=0.5) == output
    assert readings.output_of("not-there") is None


@pytest.mark.parametrize(
    ("told", "state"),
    [
        (["45000", "51234"], "ok"),
        (["45000", "72000"], "warning"),
        (["83000"], "warning"),
        ([], "unknown"),
        (["not a number"], "unknown"),
    ],
)
def test_the_hottest_zone_counts(tmp_path, told, state):
    for i, text in enumerate(told):
        zone = tmp_path / f"sys/class/thermal/thermal_zone{i}"
        zone.mkdir(parents=True)
        (zone / "temp").write_text(f"{text}\n")
    found = temperature_finding(tmp_path)
    assert found.state == state
    if state == "ok":
        assert found.fact == "51 °C"
    if state == "warning":
        assert found.remedy == "give it a heat sink or a fan"


@pytest.mark.parametrize(
    ("told", "state"), [("yes", "ok"), ("no", "warning"), ("", "unknown"), ("what", "unknown")]
)
def test_the_time_service_is_asked_by_timedatectl(tmp_path, monkeypatch, told, state):
    program(tmp_path / "timedatectl", f"echo {told}")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = this_time_sync()
    assert found.state == state
    assert found == time_sync_finding({"yes": True, "no": False}.get(told))
    assert found.remedy.startswith("sudo timedatectl set-ntp true" if state == "warning" else "")


def program(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
