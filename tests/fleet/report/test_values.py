from fleet.report import run_values

MIB = 2**20


def test_the_values_of_a_run_under_way_are_the_totals_so_far(record):
    values = run_values(record)
    assert (values["ended"], values["rounds"], values["refused"]) == (False, 3, 6)
    assert (values["late"], values["full_states"], values["abandoned_rounds"]) == (1, 3, 1)
    assert values["bytes_up"] == 6 * MIB
    assert [one["server_round"] for one in values["per_round"]] == [0, 1, 2, 3]
    assert values["per_round"][1]["clients"][0]["name"] == "pi-01"


def test_the_values_of_a_run_that_has_ended_are_its_summary_and_its_rounds(record):
    record.write_summary({"accuracy": 0.5, "strategy": "fedavg"})
    values = run_values(record)
    assert len(values.pop("per_round")) == 4
    assert values.keys() - {"participation", "bytes_by_role"} == {"accuracy", "strategy", "ended"}
    assert (values["accuracy"], values["strategy"], values["ended"]) == (0.5, "fedavg", True)


def test_the_values_tell_who_took_part_and_what_was_sent(record):
    values = run_values(record)
    assert values["participation"]["clients"][2] == {
        "name": "pi-03",
        "blocks": None,
        "asked": 2,
        "counted": 0,
        "refused": 1,
        "late": 1,
        "bytes_up": MIB + 10,
        "bytes_down": 2 * MIB + 100,
        "full_states": 1,
        "killed": 0,
    }
    assert values["participation"]["by_blocks"][0] == {
        "blocks": 1,
        "clients": 1,
        "asked": 3,
        "counted": 2,
        "refused": 1,
        "late": 0,
        "bytes_up": 3 * MIB,
        "bytes_down": 3 * MIB + 100,
        "full_states": 1,
        "killed": 0,
        "share_of_fleet": 1 / 3,
        "share_of_asked": 3 / 7,
        "share_of_counted": 2 / 3,
    }
    assert values["bytes_by_role"]["up"]["weight"] == 3000
