from fleet.deploy.flower_process import flower_environment


def test_what_the_user_set_for_others_does_not_reach_flowers_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_LOG_LEVEL", "DEBUG")
    monkeypatch.setenv("https_proxy", "http://proxy")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = flower_environment(tmp_path, 0.4, FLEET_STATE="here")
    assert not {"FLWR_LOG_LEVEL", "https_proxy", "PYTHONDONTWRITEBYTECODE"} & found.keys()
    assert found["OMP_NUM_THREADS"] == "1" and found["FLEET_STATE"] == "here"
    assert found["FLWR_HOME"] == str(tmp_path)
