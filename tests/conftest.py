"""Features that runs cache go to a folder of the test session, not to the user's."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def feature_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEET_CACHE", str(tmp_path_factory.mktemp("features")))
        yield
