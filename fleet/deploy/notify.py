"""Tell systemd that a service is up, and then that it is alive: the protocol of sd_notify(3).

A datagram to the socket that `NOTIFY_SOCKET` names. systemd's own manual advises to send it
oneself rather than to link its library, and the packages that do are not kept up. Without that
variable, outside a service, all of this does nothing.
"""

import logging
import os
import socket
from functools import cache

SECONDS = 5.0  # for systemd to take a message: a full queue must not hold up the supervision


def ready(status: str = "") -> None:
    """The service is up; systemd starts what comes after it.

    Args:
        status: a line that `systemctl status` shows.
    """
    _send("READY=1", status)


def alive(status: str = "") -> None:
    """The service does its work: to be sent at least every half of its `WatchdogSec`.

    Args:
        status: a line that `systemctl status` shows, in place of the one before.
    """
    _send("WATCHDOG=1", status)


def stopping(status: str = "") -> None:
    """The service has begun to end."""
    _send("STOPPING=1", status)


def _send(state: str, status: str) -> None:
    """Send it if anybody listens; that nobody takes it does not end the service."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = f"\0{address[1:]}"  # in Linux's abstract namespace
    message = f"{state}\nSTATUS={' '.join(status.split())}" if status else state
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(SECONDS)
            sender.sendto(message.encode(), address)
    except OSError as error:
        _warn(f"systemd does not take {state} at {os.environ['NOTIFY_SOCKET']}: {error}")


@cache  # once a process
def _warn(text: str) -> None:
    logging.getLogger(__name__).warning(text)
