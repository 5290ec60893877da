"""Whether what clients taught the head agrees with what the head knows: against wrong labels."""

import math
from collections.abc import Sequence

import numpy as np

from fleet.state import ClientUpdate, TrainableState
from strategies.aggregation.by_group import lower_median

MARGIN = 0.1  # how far below half the median cosine a client's may be
LEAST_KNOWN = 0.2  # of an even share; the model does not know a class that it names less often
FEWEST = 3  # clients among whom one may be left out


def contradicting(updates: Sequence[ClientUpdate], state: TrainableState) -> dict[str, str]:
    """Clients whose labels contradict the model that they were sent → that, in words.

    On an image with features h, label y and predicted probabilities p, the gradient of row c
    of the head W is (p_c − [c = y])·h. So ⟨ΔW, W⟩ adds up, over a client's images, the logit
    of the label less the expected one. It is above 0 where the client's labels would have
    the model more sure of what it says, and about 0 where the model is as sure as it should
    be. A client that trains on wrong labels has the model unlearn what it knows: its cosine
    is well below the others', whichever classes it takes for which. Neither the length nor
    the direction of its whole update need be odd, nor its loss.

    **The bound** is `MARGIN` below half of the (lower) median cosine, and below 0 where that
    is negative: honest clients' cosines are high while the head learns, and come down to
    about 0, on either side of it, as it has learnt.

    **Features about their mean.** Clients hold their classes in unequal parts, which moves
    their rows along the mean of all features by far the most, and says nothing of what the
    labels stand for. The bias moves by Δb_c = Σ ([c = y] − p_c) alone, so ΔW − Δb·mᵀ is what
    the rows would have moved by, had features been measured from m. A client's own m is
    Δbᵀ·ΔW/‖Δb‖²; of these the coordinate median is taken, over all clients.

    **Who is spared.** A client that alone has a class contradicts the model too: it takes
    those images for something else. But it hardly ever names that class. So a client is
    spared if most of what its bias gains is of classes whose probability at m is below
    `LEAST_KNOWN` of an even share. Where more than half of the clients contradict the model,
    it may be the model that is wrong, and nobody is left out; nor is anybody while the head
    is 0, as at the start, or among fewer than `FEWEST` clients.

    Args:
        updates: at most one per client.
        state: the model that they were made from.

    Source: Yaldiz et al., CosDefense, arXiv:2304.00160, compare a client's last layer with
    the global one, and take a high cosine for hostile; Jebreel et al., arXiv:2207.01982, find
    wrong labels in the rows of the last layer.
    """
    if state.plan.head is None or len(updates) < FEWEST:
        return {}
    weight, bias = state.plan.head
    known = state.tensors[weight].astype(np.float64)
    known -= known.mean(axis=0)
    # Twice over the clients, one at a time: together their heads may be more than memory holds.
    gains, means = {}, []  # client → Δb; the m of each
    movers = [u for u in updates if weight in u.delta and bias in u.delta]
    for update in movers:
        rows = update.delta[weight].astype(np.float64)
        if rows.any():
            gains[update.client] = gained = update.delta[bias].astype(np.float64)
            if gained.any():
                means.append((gained @ rows) / (gained @ gained))
    if not means or not known.any():
        return {}
    mean = np.median(means, axis=0)
    unknown = _shares(known @ mean + state.tensors[bias]) < LEAST_KNOWN / len(known)
    cosines = {}
    for update in movers:
        if update.client in gains:
            rows = update.delta[weight] - np.outer(gains[update.client], mean)
            cosines[update.client] = _cosine(rows, known)
    median = lower_median(np.array(list(cosines.values())))
    bound = max(median, 0.0) / 2 - MARGIN
    found = {}
    for client, cosine in cosines.items():
        gained = np.maximum(gains[client], 0)
        if cosine < bound and 2 * gained[unknown].sum() <= gained.sum():
            found[client] = (
                f"update of {weight} has a cosine of {cosine:.2f} with what the model knows, the "
                f"median is {median:.2f}; below {bound:.2f} clipped_mean leaves it out: are its "
                f"labels right?"
            )
    return found if 2 * len(found) <= len(updates) else {}


def _shares(logits: np.ndarray) -> np.ndarray:
    """Softmax."""
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def _cosine(first: np.ndarray, second: np.ndarray) -> float:
    """0 where either is 0."""
    scale = math.sqrt(np.square(first).sum() * np.square(second).sum())
    return float((first * second).sum()) / scale if scale else 0.0
