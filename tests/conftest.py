"""What runs cache and clients remember goes to folders of the test session, not to the user's."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def feature_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEET_CACHE", str(tmp_path_factory.mktemp("features")))
        yield


@pytest.fixture(autouse=True, scope="session")
def client_memories(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEET_STATE", str(tmp_path_factory.mktemp("state")))
        yield
