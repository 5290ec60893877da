import pytest


class Clock:
    """Seconds that pass as a test says."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()
