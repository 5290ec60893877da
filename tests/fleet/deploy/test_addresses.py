import pytest

from fleet.deploy.addresses import Address, is_loopback
from fleet.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "host", "port", "again"),
    [
        ("server.local", "server.local", 8000, "server.local:8000"),
        ("server.local:9001", "server.local", 9001, "server.local:9001"),
        ("192.168.1.10:8443", "192.168.1.10", 8443, "192.168.1.10:8443"),
        ("2001:db8::1", "2001:db8::1", 8000, "[2001:db8::1]:8000"),
        ("[2001:db8::1]:9001", "2001:db8::1", 9001, "[2001:db8::1]:9001"),
        ("[::1]", "::1", 8000, "[::1]:8000"),
    ],
)
def test_an_address_is_read_as_people_write_it_and_written_as_it_is_read(text, host, port, again):
    address = Address.parse(text)
    assert (address.host, address.port, str(address)) == (host, port, again)
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "neither a DNS name nor an IP address"),
        ("under scored", "neither a DNS name"),
        ("-x.local", "neither a DNS name"),
        ("https://server.local", "port .//server.local."),
        ("192.168.1", "neither a DNS name"),
        ("1.2.3.999", "neither a DNS name"),
        (f"{'a' * 64}.local", "neither a DNS name"),
        ("[server]:1", "no IP address in its brackets"),
        ("server:0", "port '0'; a port lies between 1 and 65535"),
        ("server:65536", "port '65536'"),
        ("server:", "port ''"),
        ("server:+8", r"port '\+8'"),
    ],
)
def test_what_is_no_address_is_refused_with_the_reason(text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Address.parse(text)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.0.0.1", "127.9.9.9", "::1"])
def test_loopback(host):
    assert is_loopback(host) and is_loopback("::ffff:127.0.0.1")


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.1", "localhost.example.org", "::ffff:10.0.0.1"]
)
def test_what_others_can_reach_is_not_loopback(host):
    assert not is_loopback(host)
