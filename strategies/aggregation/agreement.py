"""Whether what clients taught the head agrees with what the head knows: against wrong labels."""

import math
from collections.abc import Sequence

import numpy as np

from fleet.state import ClientUpdate, TrainableState

LEAST_AGREEMENT = -0.1  # cosine of a client's update of the head with the head
FEWEST = 3  # clients among whom one may be left out


def contradicting(updates: Sequence[ClientUpdate], state: TrainableState) -> dict[str, str]:
    """Clients whose labels contradict the model that they were sent → that, in words.

    On an image with features h, label y and predicted probabilities p, the gradient of row c
    of the head W is (p_c − [c = y])·h. So ⟨ΔW, W⟩ adds up, over a client's images, the logit
    of the label less the expected one. It is above 0 where the client's labels would have
    the model more sure of what it says, and about 0 where the model is as sure as it should
    be. A client that trains on wrong labels has the model unlearn what it knows: its cosine
    is well below 0, whichever classes it takes for which. Neither the length nor the
    direction of its whole update need be odd, nor its loss.

    **Features about their mean.** Clients hold their classes in unequal parts, which moves
    their rows along the mean of all features by far the most, and says nothing of what the
    labels stand for. The bias moves by Δb_c = Σ ([c = y] − p_c) alone, so ΔW − Δb·mᵀ is what
    the rows would have moved by, had features been measured from m. A client's own m is
    Δbᵀ·ΔW/‖Δb‖²; of these the coordinate median is taken, over all clients.

    **Who is spared.** An honest client whose images the model takes for something else, as of
    a class that nobody else has, disagrees with it too; the bound is far enough below 0 that
    such clients seldom fall below it. Where more than half of the clients do, the model may
    be what is wrong, and nobody is left out; nor is anybody while the head is 0, as at the
    start, or among fewer than `FEWEST` clients.

    Args:
        updates: at most one per client.
        state: the model that they were made from.

    Source: the cosine of a client's last layer with the global one is that of CosDefense
    (Yaldiz et al., arXiv:2304.00160), which takes a high one for hostile and has no mean taken
    off; that wrong labels show in the rows of the last layer is from Jebreel et al.,
    arXiv:2207.01982.
    """
    head = state.plan.head
    if head is None or len(updates) < FEWEST:
        return {}
    weight, bias = head
    known = state.tensors[weight].astype(np.float64)
    known -= known.mean(axis=0)
    moves = {}  # client → (ΔW, Δb)
    for update in updates:
        if weight in update.delta and bias in update.delta:
            pair = (update.delta[name] for name in head)
            moves[update.client] = tuple(np.asarray(array, np.float64) for array in pair)
    means = [(by @ rows) / (by @ by) for rows, by in moves.values() if by.any()]
    mean = np.median(means, axis=0) if means else np.zeros(known.shape[1])
    found = {}
    for client, (rows, by) in moves.items():
        taught = rows - np.outer(by, mean)
        scale = math.sqrt((taught**2).sum() * (known**2).sum())
        cosine = float((taught * known).sum()) / scale if scale else 0.0
        if cosine < LEAST_AGREEMENT:
            found[client] = (
                f"update of {weight} has a cosine of {cosine:.2f} with what the model knows; "
                f"below {LEAST_AGREEMENT:g} clipped_mean leaves it out: are its labels right?"
            )
    return found if 2 * len(found) <= len(updates) else {}
