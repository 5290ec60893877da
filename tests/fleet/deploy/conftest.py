import logging

import pytest


@pytest.fixture(autouse=True)
def own_log_is_heard(monkeypatch):
    """A command that ran before in this process may have taken the log for itself."""
    monkeypatch.setattr(logging.getLogger("fleet.deploy"), "propagate", True)
