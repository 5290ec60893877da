"""Where a server is: host names, IP addresses and ports, as people write them."""

import ipaddress
import re
from dataclasses import dataclass

from fleet.errors import ConfigError

DEFAULT_PORT = 8000

_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")


@dataclass(frozen=True)
class Address:
    """A host and a port.

    Attributes:
        host: a DNS name, or an IP address without brackets.
        port: of TCP, from 1 to 65535.
    """

    host: str
    port: int = DEFAULT_PORT

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Read `NAME`, `NAME:PORT`, `1.2.3.4:PORT`, `2001:db8::1` or `[2001:db8::1]:PORT`.

        Raises:
            ConfigError: for anything else.
        """
        host, port = text, str(DEFAULT_PORT)
        if bracketed := re.fullmatch(r"\[([^\]]*)\](?::(.*))?", text):
            host, port = bracketed[1], bracketed[2] or port
            if ip_address(host) is None:
                raise ConfigError(f"host {text} has no IP address in its brackets; give NAME:PORT")
        elif text.count(":") == 1:
            host, port = text.split(":")
        if ip_address(host) is None and not is_dns_name(host):
            raise ConfigError(
                f"host {text!r} is neither a DNS name nor an IP address; give for example "
                f"server.local:{DEFAULT_PORT}"
            )
        if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
            raise ConfigError(f"host {text} has port {port!r}; a port lies between 1 and 65535")
        return cls(host, int(port))

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return is_loopback(self.host)

    def __str__(self) -> str:
        """As `parse` reads it, with brackets about an IPv6 address."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by every rule: `localhost` or a loopback address."""
    address = ip_address(host)
    if address is None:
        return host.lower() == "localhost"
    mapped = getattr(address, "ipv4_mapped", None)  # ::ffff:127.0.0.1
    return (mapped or address).is_loopback


def ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address that a host is written as; None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_dns_name(host: str) -> bool:
    """Whether a host is a name that a certificate and a resolver both take."""
    labels = host.split(".")
    # What ends in a number is an IP address that is none: 192.168.1, 1.2.3.999.
    return (
        len(host) <= 253
        and all(_LABEL.fullmatch(label) for label in labels)
        and not labels[-1].isdigit()
    )
