import os
import zlib
from collections import Counter

import pytest

from fleet.mobiletl import TransferModel
from simulations.launch import simulate
from tests.runs import SMALL

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture
def frozen_runs(tmp_path, monkeypatch):
    """How often a frozen part ran on each image, in this process and in its forks."""
    seen = tmp_path / "seen"
    file = os.open(seen, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    honest = TransferModel.features

    def features(model, images):
        for image in images:
            if image.any():  # else it probes for shapes
                # Of one length, and appended in one call: processes do not mix theirs.
                os.write(file, b"%08x" % zlib.crc32(image.contiguous().numpy().tobytes()))
        return honest(model, images)

    monkeypatch.setattr(TransferModel, "features", features)

    def runs():
        ids = seen.read_bytes()
        return Counter(ids[i : i + 8] for i in range(0, len(ids), 8))

    yield runs
    os.close(file)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_frozen_part_sees_each_image_of_the_fleet_once(frozen_runs, tmp_path, workers):
    simulate(
        {
            "clients": 6,
            "sampled": 0,
            "rounds": 3,
            "backbone": "mobilenet_v3_small",
            "weights": "none",
            "image-size": 32,
            "train-examples": 90,
            "test-examples": 40,
            "partition": "iid",
            "blocks": "1,2",  # unequal plans, which are cut at one place
            "local-epochs": 2,
            "learning-rate": 1e-6,  # a head on features of random weights makes gradients vast
            "head-start": True,
            "cache-dir": str(tmp_path / "cache"),
            "run-dir": str(tmp_path / "run"),
        },
        workers=workers,
    )
    runs = frozen_runs()
    assert len(runs) > 100
    assert set(runs.values()) == {1}


def test_client_memory_does_not_depend_on_what_an_earlier_run_cached(tmp_path):
    """Nor on which of the clients that share the cache came first."""

    def peaks(run):
        settings = SMALL | {"cache-dir": str(tmp_path / "cache"), "run-dir": str(tmp_path / run)}
        rounds = list(simulate(settings).rounds())
        return [client.peak_bytes for report in rounds for client in report.clients]

    cold, warm = peaks("cold"), peaks("warm")
    assert cold == warm
    assert len(cold) == 4 and len(set(cold)) == 1  # every client, in every round
