"""How a SuperNode talks to its server, where Flower's own way loses updates or time.

Flower 1.41 tries again whatever a bad network does, with one exception: an error that
names TLS ends a transfer, and with it the update that was on its way. A connection that
breaks inside TLS is such an error, and a bad link breaks many. And a SuperNode that has
nothing to do looks for a message every 3 s, which in a run of short rounds is most of
what a round takes.

A connection that nobody uses for 5 s is closed, and the app of a run is fetched anew for
each; `fleet.deploy.fleet_client` does neither. And a device that refuses an app does not
say which it is; `fleet.deploy.trust` does.

A heartbeat has 5 s to be answered. Where an answer takes two, and a connection that was
reset is made anew with three, a device so comes to count as offline while it works.

And one may come to be a step behind for good. The main loop takes a message, waits for
a reply, and sends what there is. If a run ends while its message is being fetched, the
loop does not wait for that reply; from then on it sends each time the reply to the
message before, and the server waits in vain for the last one. How it waits for ever for
a reply that nobody writes any more, `fleet.deploy.dead_tasks` tells.
"""

import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from fleet.deploy.dead_tasks import answer_for_the_dead

SOON_SECONDS = 0.5  # between two looks for a message, while a run goes on
BUSY_SECONDS = 120.0  # after a message, a run is taken to go on
HEARTBEAT_SECONDS = 25.0  # to answer one; the next is due after 30 s, two may fail

_LATE = 0  # in place of a run's number

_log = logging.getLogger("flwr")


def improve(give_up: Callable[[], None]) -> None:
    """Change all of it in Flower's modules; what another version has no more stays as it is.

    Args:
        give_up: ends this process, to be started again.
    """
    from flwr.supernode import fleet_http_client, fleet_http_connection, start_client_internal
    from flwr.supernode.nodestate import in_memory_nodestate

    for change, module in (
        (keep_trying, fleet_http_connection),
        (keep_connection, fleet_http_connection),
        (wait_for_heartbeats, fleet_http_client),
        (send_late_replies, start_client_internal),
        (look_sooner, start_client_internal),
        (name_refusals, start_client_internal),
        (partial(answer_for_the_dead, give_up=give_up), in_memory_nodestate),
    ):
        try:
            change(module)
        except AttributeError as error:
            _log.warning("this version of Flower stays as it is: %s", error)


def keep_trying(connection: ModuleType) -> None:
    """Let transfers outlast a connection that breaks inside TLS.

    A certificate that does not hold still ends them: that does not pass by itself.

    Args:
        connection: `flwr.supernode.fleet_http_connection`.
    """
    import httpx

    make = connection.make_simple_http_retry_invoker

    def make_patient() -> Any:
        invoker = make()
        gives_up = invoker.should_giveup

        def should_give_up(error: Exception) -> bool:
            if isinstance(error, httpx.TransportError):
                return "certificate" in str(error).lower()
            return gives_up(error)

        invoker.should_giveup = should_give_up
        return invoker

    connection.make_simple_http_retry_invoker = make_patient


def keep_connection(connection: ModuleType) -> None:
    """Let the SuperNode talk through a `patient_client`; apps are kept beside its state.

    Args:
        connection: `flwr.supernode.fleet_http_connection`.
    """
    from fleet.deploy.fleet_client import patient_client

    connection.FleetHttpClient = patient_client(connection.FleetHttpClient, _apps_folder())


def name_refusals(loop: ModuleType) -> None:
    """Let a device that refuses an app say which it is, and why.

    Args:
        loop: `flwr.supernode.start_client_internal`.
    """
    from fleet.deploy.fleet_client import Apps
    from fleet.deploy.trust import refuse_by_name

    folder = _apps_folder()
    refuse_by_name(loop, Apps(folder) if folder else None)


def wait_for_heartbeats(client: ModuleType) -> None:
    """Give heartbeats the time that a slow link takes.

    Args:
        client: `flwr.supernode.fleet_http_client`, which looks at its constant each time.
    """
    client.HEARTBEAT_CALL_TIMEOUT = max(client.HEARTBEAT_CALL_TIMEOUT, HEARTBEAT_SECONDS)


def look_sooner(loop: ModuleType, clock: Callable[[], float] = time.monotonic) -> None:
    """Let the main loop look for the next message soon, for some time after each.

    An idle device asks as seldom as Flower's.

    Args:
        loop: `flwr.supernode.start_client_internal`.
        clock: seconds that pass.
    """
    pull, sleep = loop._pull_and_store_message, loop.time.sleep
    busy_until = 0.0

    def pull_and_remember(*args: Any, **kwargs: Any) -> int | None:
        nonlocal busy_until
        run_id = pull(*args, **kwargs)
        if run_id is not None:
            busy_until = clock() + BUSY_SECONDS
        return run_id

    def sleep_less(seconds: float) -> None:
        sleep(min(seconds, SOON_SECONDS) if clock() < busy_until else seconds)

    loop._pull_and_store_message = pull_and_remember
    # Of that module alone: `time` itself belongs to everybody.
    loop.time = SimpleNamespace(**{**vars(loop.time), "sleep": sleep_less})


def _apps_folder() -> Path | None:
    state = os.environ.get("FLEET_STATE")
    return Path(state) / "apps" if state else None


def send_late_replies(loop: Any) -> None:
    """Let Flower's main loop send whatever reply is there, message or no message.

    Args:
        loop: the module `flwr.supernode.start_client_internal`.
    """
    pull = loop._pull_and_store_message

    def pull_or_send(state: Any, **others: Any) -> int | None:
        run_id = pull(state=state, **others)
        # The loop goes on to send for any number; nothing else depends on which.
        return _LATE if run_id is None and has_unsent_reply(state) else run_id

    loop._pull_and_store_message = pull_or_send


def has_unsent_reply(state: Any) -> bool:
    """Whether a reply lies in a SuperNode's store; unlike Flower's question, it takes none out."""
    with state.lock_msg_store:
        return any(
            entry.message.metadata.reply_to_message_id and not entry.is_retrieved
            for entry in state.msg_store.values()
        )
