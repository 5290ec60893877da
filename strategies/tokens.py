"""Round tokens: proof that a reply answers the message that it claims to answer."""

import secrets
from collections import OrderedDict

from fleet.errors import UpdateError

_BYTES = 16
_REMEMBERED = 10_000  # spent tokens that are still told from invented ones


class Tokens:
    """Random tokens, a new one for every client and message.

    A client can write any sender into a reply; a token it has only for the
    messages that it was sent. Each is good for one reply.
    """

    def __init__(self) -> None:
        self._open: dict[str, str] = {}  # client → token of the message under way
        self._issued: OrderedDict[str, tuple[str, int]] = OrderedDict()  # token → client, round

    def issue(self, client: str, server_round: int) -> str:
        """A token for a message to a client; the one before it is void."""
        token = secrets.token_hex(_BYTES)
        self._open[client] = token
        self._issued[token] = (client, server_round)
        while len(self._issued) > _REMEMBERED:
            self._issued.popitem(last=False)
        return token

    def spend(self, client: str, token: str) -> None:
        """Take the token of a client's reply.

        Raises:
            UpdateError: if it is not that of the message under way, and whose
                and from when it is instead.
        """
        expected = self._open.get(client)
        if expected is not None and secrets.compare_digest(
            token.encode(errors="replace"), expected.encode()
        ):
            del self._open[client]
            return
        if token not in self._issued:
            what = "an unknown token" if token else "no token"
            raise UpdateError(
                f"reply of {client} carries {what}; run the same version on server and client"
            )
        owner, server_round = self._issued[token]
        if owner != client:
            raise UpdateError(f"reply of {client} carries the token of {owner}; it is forged")
        raise UpdateError(
            f"reply of {client} carries its token of round {server_round}, which is spent or over; "
            f"it is a replay, or late"
        )
