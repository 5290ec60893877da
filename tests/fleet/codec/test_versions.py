import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.codec import (
    Download,
    Payload,
    UnknownVersion,
    Versions,
    decode,
    encode,
    follow,
    moved,
    version_of,
)
from fleet.errors import UpdateError
from fleet.state import TrainableState
from tests.plans import random_arrays, random_state, toy_plan

PLAN = toy_plan(width=8)
CODECS = ("float16", "int8", "int4", "int4+feedback", "topk:0.05+int4", "float32+feedback")


def state_like(state, seed, scale=0.01):
    """A state not far from another: where a round may lead."""
    update = random_arrays(state.plan, seed, scale)
    statistics = {s.name: np.abs(update[s.name]) for s in state.plan.specs if s.is_statistic}
    return moved(state, update | statistics)


def same_bits(one, other):
    return all(one.tensors[name].tobytes() == a.tobytes() for name, a in other.tensors.items())


def advanced(codec, rounds, initial=None):
    versions = Versions(initial or random_state(PLAN, 0), codec)
    for round_ in range(1, rounds + 1):
        versions.advance(state_like(versions.state, round_), [round_])
    return versions


class Server:
    """Keeps what it believes each client to hold, as of the last reply that it got."""

    def __init__(self, codec, clients):
        self.initial = random_state(PLAN, 0)
        self.versions = Versions(self.initial, codec)
        self.believed = [self.versions.newest] * clients
        self.held = [self.initial] * clients

    def ask(self, client, reply_arrives):
        download = self.versions.download(self.believed[client])
        states = [self.held[client]]
        if self.held[client] is not self.initial:
            states.append(self.initial)
        self.held[client] = follow(download, PLAN, states)
        assert same_bits(self.held[client], self.versions.state)
        assert version_of(self.held[client]) == self.versions.newest
        if reply_arrives:
            self.believed[client] = self.versions.newest


events = st.one_of(
    st.tuples(st.just("advance"), st.integers(0, 2**16)),
    st.tuples(st.integers(0, 3), st.booleans()),
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from((*CODECS, "float32")), st.lists(events, max_size=14))
def test_every_client_comes_to_the_newest_version_bit_for_bit(codec, story):
    server = Server(codec, clients=4)
    for who, what in story:
        if who == "advance":
            server.versions.advance(state_like(server.versions.state, what), [what])
        else:
            server.ask(who, reply_arrives=what)
    for client in range(4):
        server.ask(client, reply_arrives=True)


@pytest.mark.parametrize("codec", CODECS)
def test_steps_come_to_the_same_from_any_version(codec):
    initial = random_state(PLAN, 0)
    versions, passed = Versions(initial, codec), [initial]
    for round_ in range(4):
        versions.advance(state_like(versions.state, round_), [round_])
        passed.append(versions.state)
    for state in passed:
        download = versions.download(version_of(state))
        assert download.versions[-1] == versions.newest
        assert same_bits(follow(download, PLAN, [state]), versions.state)


def test_a_client_may_hold_a_newer_version_than_the_server_believes():
    initial = random_state(PLAN, 0)
    versions = Versions(initial, "topk:0.05+int4")
    versions.advance(state_like(initial, 1), [1])
    middle = versions.state
    versions.advance(state_like(middle, 2), [2])
    download = versions.download(version_of(initial))
    assert len(download.payloads) == 2
    # The first step may be anything: a client that holds what it leads to does not read it.
    broken = Download(download.versions, (Payload("zip", PLAN.digest, b""), download.payloads[1]))
    assert same_bits(follow(broken, PLAN, [middle]), versions.state)


def test_held_states_are_asked_for_only_as_far_as_needed():
    initial = random_state(PLAN, 0)
    versions = advanced("int8", 1, initial)

    def held():
        yield initial
        raise AssertionError("asked for another")

    follow(versions.download(version_of(initial)), PLAN, held())
    full = advanced("float32", 1, initial).download(None)
    follow(full, PLAN, (pytest.fail("asked for a state") for _ in [0]))


@pytest.mark.parametrize("codec", CODECS)
def test_kept_steps_never_exceed_the_state(codec):
    versions = Versions(random_state(PLAN, 0), codec)
    dropped = 0
    for round_ in range(60):
        oldest = versions._versions[0]
        versions.advance(state_like(versions.state, round_), [round_])
        download = versions.download(versions._versions[0])
        assert not download.is_full_state
        assert download.nbytes <= PLAN.nbytes
        assert len(download.versions) == len(download.payloads) + 1
        if versions._versions[0] != oldest:
            dropped += 1
            assert versions.download(oldest).is_full_state
    assert dropped > 5


@pytest.mark.parametrize("held", [None, "", "0123456789abcdef"])
@pytest.mark.parametrize("codec", [*CODECS, "float32"])
def test_a_client_that_holds_no_known_version_gets_the_state(codec, held):
    versions = advanced(codec, 3)
    download = versions.download(held)
    assert download.is_full_state
    assert download.versions == (versions.newest,)
    assert download.nbytes == PLAN.nbytes + 4 * (len(PLAN.specs) - 1)
    assert same_bits(follow(download, PLAN, []), versions.state)


def test_a_client_that_holds_the_newest_gets_nothing():
    versions = advanced("int4", 2)
    download = versions.download(versions.newest)
    assert (download.payloads, download.nbytes) == ((), 0)
    assert not download.is_full_state
    assert same_bits(follow(download, PLAN, [versions.state]), versions.state)


def test_with_float32_every_download_is_the_state_itself():
    versions = advanced("float32", 0)
    target = state_like(versions.state, 1)
    versions.advance(target, [1])
    assert same_bits(versions.state, target)
    assert versions.download(version_of(random_state(PLAN, 0))).is_full_state


def test_a_state_that_did_not_change_makes_no_version():
    versions = advanced("int4", 1)
    before = versions.newest
    versions.advance(TrainableState(PLAN, versions.state.tensors), [2])
    assert versions.newest == before
    assert len(versions.download(versions._versions[0]).payloads) == 1


@pytest.mark.parametrize("codec", ["int4+feedback", "topk:0.05+int4"])
def test_what_a_step_leaves_out_is_in_the_next(codec):
    target = state_like(random_state(PLAN, 0), 1)
    versions = Versions(random_state(PLAN, 0), codec)
    distances = []
    for round_ in range(40):
        versions.advance(target, [round_])
        distances.append(
            sum(np.square(target.tensors[n] - a).sum() for n, a in versions.state.tensors.items())
        )
    assert distances[-1] < 1e-3 * distances[0]


@pytest.mark.parametrize("codec", CODECS)
def test_statistics_are_replaced_and_variances_never_negative(codec):
    versions = Versions(random_state(PLAN, 0), codec)
    for round_ in range(5):
        target = state_like(versions.state, round_, scale=10.0**-round_)
        versions.advance(target, [round_])
        for spec in PLAN.specs:
            if spec.is_statistic:
                now, meant = versions.state.tensors[spec.name], target.tensors[spec.name]
                np.testing.assert_allclose(now, meant, rtol=2**-11, atol=2**-39 * 10)
                assert spec.role != "var" or (now >= 0).all()


def test_moved_adds_deltas_and_replaces_statistics():
    state, update = random_state(PLAN, 0), random_arrays(PLAN, 1)
    after = moved(state, update).tensors
    for spec in PLAN.specs:
        before = 0 if spec.is_statistic else state.tensors[spec.name]
        np.testing.assert_array_equal(after[spec.name], before + update[spec.name])


def test_a_version_is_of_every_bit_and_of_the_plan():
    state = random_state(PLAN, 0)
    seen = {version_of(state)}
    for spec in PLAN.specs:
        for bit in (0, 31):
            array = state.tensors[spec.name].copy()
            array.view(np.uint32).flat[-1] ^= 1 << bit
            seen.add(version_of(TrainableState(PLAN, {**state.tensors, spec.name: array})))
    assert len(seen) == 1 + 2 * len(PLAN.specs)
    other = toy_plan(width=8, blocks=2)
    object.__setattr__(other, "weights_digest", "1" * 64)
    assert version_of(TrainableState(other, state.tensors)) not in seen
    assert {len(version) for version in seen} == {16}
    assert version_of(TrainableState(PLAN, dict(reversed(state.tensors.items())))) in seen


def test_a_state_that_comes_out_as_another_version_is_refused():
    initial = random_state(PLAN, 0)
    versions = advanced("int8", 1, initial)
    wrong = "f" * 16
    text = (
        f"the state received is version {versions.newest}, the server's is {wrong}; it changed on "
        f"the way, or the server runs another version of this program"
    )
    steps = versions.download(version_of(initial))
    for download, held in (
        (Download((steps.versions[0], wrong), steps.payloads), [initial]),
        (Download((wrong,), versions.download(None).payloads), []),
    ):
        with pytest.raises(UpdateError, match=text):
            follow(download, PLAN, held)


@pytest.mark.parametrize("bit", range(0, 32, 5))
def test_a_flipped_bit_of_a_step_or_a_state_is_noticed(bit):
    initial = random_state(PLAN, 0)
    versions = advanced("float16", 1, initial)
    for held, states in ((version_of(initial), [initial]), (None, [])):
        download = versions.download(held)
        data = bytearray(download.payloads[0].data)
        data[-4 + bit // 8] ^= 1 << bit % 8
        payload = Payload(download.payloads[0].codec, PLAN.digest, bytes(data))
        with pytest.raises(UpdateError, match="the state received is version"):
            follow(Download(download.versions, (payload,)), PLAN, states)


def test_a_client_that_holds_none_of_the_versions_says_so():
    versions = advanced("int4", 2)
    download = versions.download(versions._versions[0])
    text = (
        f"this device holds no version from which the server's 2 steps lead to {versions.newest}; "
        f"it will be sent the whole state"
    )
    for held in ([], [random_state(PLAN, 9), random_state(PLAN, 8)]):
        with pytest.raises(UnknownVersion, match=text):
            follow(download, PLAN, held)


def test_a_target_that_is_not_finite_changes_nothing():
    versions = advanced("int4", 1)
    state, newest = versions.state, versions.newest
    broken = {**state.tensors, "head.bias": np.array([1, np.nan, 1], np.float32)}
    with pytest.raises(UpdateError, match=r"head\.bias holds NaN or infinity"):
        versions.advance(TrainableState(PLAN, broken), [2])
    assert versions.state is state
    assert versions.newest == newest


def test_a_step_is_the_codecs_encoding_of_what_is_due():
    initial = random_state(PLAN, 0)
    target = state_like(initial, 1)
    versions = Versions(initial, "int4")
    versions.advance(target, [4, 2])
    due = {
        s.name: target.tensors[s.name] - (0 if s.is_statistic else initial.tensors[s.name])
        for s in PLAN.specs
    }
    step = encode(due, PLAN, "int4", [4, 2])
    assert versions.download(version_of(initial)).payloads == (step,)
    assert same_bits(versions.state, moved(initial, decode(step, PLAN)))
