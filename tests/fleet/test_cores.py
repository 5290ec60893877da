import os

import psutil
import pytest

from fleet.cores import available_cores


def test_a_process_may_use_what_it_is_confined_to():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("a process cannot be confined here")
    whole = os.sched_getaffinity(0)
    assert available_cores() == len(psutil.Process().cpu_affinity())
    try:
        os.sched_setaffinity(0, {min(whole)})
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, whole)
