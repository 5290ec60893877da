"""Round tokens: proof that a reply answers the message that it claims to answer."""

import hmac
import secrets
from itertools import count

from fleet.errors import UpdateError

_KEY_BYTES = 32
_DIGITS = 32  # hexadecimal, of a token's code: 128 bits
_LONGEST = 100  # characters; a longer one is not ours, and would take long to look into


class Tokens:
    """Tokens that only this object can make, a new one for every client and message.

    A client can write any sender into a reply; a token it has only for the
    messages that it was sent. Each is good for one reply.

    A token is its round, its number, and a code over both and the client (HMAC-SHA-256):
    whose it is and from when can be told for ever, and nothing is remembered for it. All
    are of one length, so that messages of a run that goes on are as long as they would be.
    """

    def __init__(self) -> None:
        self._key = secrets.token_bytes(_KEY_BYTES)
        self._numbers = count(1)
        self._open: dict[str, str] = {}  # client → token of the message under way; "": none is

    def issue(self, client: str, server_round: int) -> str:
        """A token for a message to a client; the one before it is void."""
        self._open[client] = self._token(
            client, f"{server_round:08x}", f"{next(self._numbers):010x}"
        )
        return self._open[client]

    def spend(self, client: str, token: str) -> None:
        """Take the token of a client's reply.

        Raises:
            UpdateError: if it is not that of the message under way, and whose
                and from when it is instead.
        """
        expected = self._open.get(client)
        if expected and _equal(token, expected):
            self._open[client] = ""
            return
        server_round, owner = self._source(client, token)
        if owner == client:
            raise UpdateError(
                f"reply of {client} carries its token of round {int(server_round, 16)}, which is "
                f"spent or over; it is a replay, or late"
            )
        if owner is not None:
            raise UpdateError(f"reply of {client} carries the token of {owner}; it is forged")
        what = "an unknown token" if token else "no token"
        raise UpdateError(
            f"reply of {client} carries {what}; run the same version on server and client"
        )

    def _source(self, client: str, token: str) -> tuple[str, str | None]:
        """Round and client that a token was made for; None: it was not made here.

        Args:
            client: who is asked about first.
        """
        server_round, _, rest = token.partition("-")
        number = rest.partition("-")[0]
        owners = (client, *self._open) if len(token) <= _LONGEST else ()
        for owner in owners:
            if _equal(token, self._token(owner, server_round, number)):
                return server_round, owner
        return server_round, None

    def _token(self, client: str, server_round: str, number: str) -> str:
        # No round and no number holds the character between them; a client's name comes last.
        facts = f"{server_round}-{number}-{client}".encode(errors="surrogatepass")
        code = hmac.new(self._key, facts, "sha256").hexdigest()[:_DIGITS]
        return f"{server_round}-{number}-{code}"


def _equal(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(errors="replace"), other.encode())
