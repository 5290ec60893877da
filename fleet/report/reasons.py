"""Why something was refused, in a few words: what a legend has room for."""

import re

from fleet.report.history import kind_of

# What reasons of the server's own say → that in short; the first that is found counts. A
# round that is abandoned comes first, as its reason holds another.
KINDS = {
    r"^round abandoned: ": "round abandoned",
    r"^update is \S+ long, the median of": "much longer than the others' updates",
    r"a cosine of \S+ with what the others": "points against the others' updates",
    r"a cosine of \S+ with what the model knows": "contradicts what the model knows",
    r"holds NaN or infinity|must be a finite number": "not finite",
    r"holds a number of magnitude": "numbers far too large",
    r"holds a negative variance": "negative variance",
    r"^(evaluation: )?no reply within": "no reply in time",
    r"^(evaluation: )?no reply: it was dropped": "reply lost on its way",
    r"^(evaluation: )?reply to no message": "reply that nobody asked for",
    r"which is spent or over; it is a replay": "replay of an old reply, or late",
    r"carries the token of .* it is forged": "forged: another client's token",
    r"carries (an unknown|no) token": "no valid token",
    r"reply has \S+ bytes, no honest one": "far more bytes than an update has",
    r"update is of plan|run the server's plan": "not of the server's plan",
    r"update is of \S+ blocks, the run's": "not the same blocks as the others",
    r"update is in codec": "not in the run's codec",
    r"num-examples must be a whole number": "impossible number of examples",
    r"^(evaluation: )?[\w-]+ must be from \S+ to \S+, got": "impossible loss or measurement",
    r"; (they|it) (were|was) (damaged|cut)|; they changed on the way": "damaged on its way",
    r"reply cannot be read": "cannot be read",
}
_END = re.compile(r"[,;.](?=\s)|\s\(|:(?=\s)(?<!Error:)(?<!evaluation:)")


def in_short(reason: str) -> str:
    """A reason's kind, or its first clause without the figures in it."""
    for said, short in KINDS.items():
        if re.search(said, reason):
            return short
    return kind_of(_END.split(reason, maxsplit=1)[0].strip() or reason)
