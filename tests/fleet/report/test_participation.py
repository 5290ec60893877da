import numpy as np
import pytest

from fleet.records import ClientReport, RoundReport
from fleet.report import Part, by_blocks, participation
from tests.many import many

MIB = 2**20


def test_every_client_has_its_part(rounds):
    assert participation(rounds) == [
        Part(
            name="pi-01",
            blocks=1,
            asked=3,
            counted=2,  # the evaluation that was refused takes nothing from its update
            refused=1,
            late=0,
            bytes_up=3 * MIB,
            bytes_down=3 * MIB + 100,
            full_states=1,
        ),
        Part(
            name="pi-02",
            blocks=3,
            asked=2,  # not in round 2, in which it evaluates alone, nor in round 0
            counted=1,
            refused=1,
            late=0,
            bytes_up=3 * MIB,
            bytes_down=3 * MIB + 100,
            full_states=1,
        ),
        Part(
            name="pi-03",
            blocks=None,
            asked=2,
            counted=0,
            refused=1,
            late=1,
            bytes_up=MIB + 10,
            bytes_down=2 * MIB + 100,
            full_states=1,
        ),
    ]


def test_shares_of_each_k_stand_beside_the_fleets(rounds):
    shares = [
        (g.blocks, g.share_of_fleet, g.share_of_asked, g.share_of_counted)
        for g in by_blocks(participation(rounds))
    ]
    assert shares == [
        (1, 1 / 3, 3 / 7, 2 / 3),
        (3, 1 / 3, 2 / 7, 1 / 3),
        (None, 1 / 3, 2 / 7, 0.0),
    ]


def test_there_are_no_shares_of_nothing(rounds):
    (group,) = by_blocks(participation(rounds[:1]))
    assert (group.clients, group.share_of_fleet) == (3, 1.0)
    assert (group.share_of_asked, group.share_of_counted) == (None, None)


def test_k_is_that_of_the_last_update_that_counted():
    def trained(server_round, blocks):
        update = ClientReport(
            name="pi", blocks=blocks, num_examples=1, loss=0.0, peak_bytes=0, seconds=0.0
        )
        return RoundReport(server_round=server_round, accuracy=None, loss=None, clients=(update,))

    (part,) = participation([trained(1, 5), trained(2, 1)])
    assert (part.blocks, part.counted) == (1, 2)


def test_an_older_record_tells_of_those_of_whom_something_came(old_rounds):
    parts = {p.name: (p.asked, p.counted, p.refused) for p in participation(old_rounds)}
    assert parts.pop("unknown sender") == (1, 0, 1)
    # pi-01's refused evaluation is no refused update; who was late is not on record.
    assert parts == {"pi-01": (3, 2, 1), "pi-02": (2, 1, 1), "pi-03": (1, 0, 1)}


@many("seed", range(20))
def test_parts_and_groups_add_up_to_what_happened(seed):
    rng = np.random.default_rng(seed)
    names = [f"pi-{number:02}" for number in range(12)]
    blocks = dict(zip(names, rng.choice([1, 3, 5], size=len(names)).tolist(), strict=True))
    # Who is asked, and what comes of it: 0 not asked, 1 counted, 2 refused, 3 late.
    fate = rng.integers(0, 4, size=(8, len(names)))
    up, down = rng.integers(1, 1000, size=(2, *fate.shape))
    rounds = []
    for row, ups, downs in zip(fate, up.tolist(), down.tolist(), strict=True):
        counted, refused, late = (
            [name for name, end in zip(names, row, strict=True) if end == wanted]
            for wanted in (1, 2, 3)
        )
        rounds.append(
            RoundReport(
                server_round=len(rounds) + 1,
                accuracy=None,
                loss=None,
                clients=tuple(
                    ClientReport(
                        name=name,
                        blocks=blocks[name],
                        num_examples=1,
                        loss=0.0,
                        peak_bytes=0,
                        seconds=0.0,
                    )
                    for name in counted
                ),
                asked=tuple(sorted([*counted, *refused, *late])),
                refused=dict.fromkeys(refused, "NaN"),
                late=tuple(late),
                bytes_by_client=dict(zip(names, zip(ups, downs, strict=True), strict=True)),
            )
        )
    parts = participation(rounds)
    assert [part.name for part in parts] == names
    columns = np.array([[p.asked, p.counted, p.refused, p.late] for p in parts])
    wanted = [(fate > 0).sum(0), *((fate == end).sum(0) for end in (1, 2, 3))]
    assert (columns == np.stack(wanted, 1)).all()
    assert [part.bytes_up for part in parts] == up.sum(0).tolist()
    assert [part.bytes_down for part in parts] == down.sum(0).tolist()

    groups = by_blocks(parts)
    assert sum(group.asked for group in groups) == (fate > 0).sum()
    for key in ("share_of_fleet", "share_of_asked", "share_of_counted"):
        assert sum(getattr(group, key) for group in groups) == pytest.approx(1)
    for group in groups:
        members = [n for n, p in enumerate(parts) if p.blocks == group.blocks]
        assert group.clients == len(members)
        assert group.share_of_counted == (fate[:, members] == 1).sum() / (fate == 1).sum()
