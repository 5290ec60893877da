"""A network that loses replies."""

from collections.abc import Sequence

import numpy as np
from flwr.app import MessageType

from fleet.message import read_task
from simulations.local_engine import Exchange, Interference


def dropping(share: float, seed: int) -> Interference:
    """Lose replies to train messages, as if they never came.

    Args:
        share: probability that a reply is lost.
        seed: with round and client it decides, so that the same replies are lost
            whatever the clients train, and those of a smaller share with a larger one.
    """

    def arrives(exchange: Exchange) -> bool:
        if exchange.message.metadata.message_type != MessageType.TRAIN:
            return True
        server_round = read_task(exchange.message.content).server_round
        rng = np.random.default_rng([seed, server_round, exchange.client, *b"drop"])
        return rng.random() >= share

    def interfere(exchanges: Sequence[Exchange]) -> Sequence[Exchange]:
        return [exchange for exchange in exchanges if arrives(exchange)]

    return interfere
