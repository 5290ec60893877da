"""Bytes of a run by link and by what they are."""

from collections import Counter
from collections.abc import Iterable

from fleet.records import RoundReport

# As a plan names them, those that train first; `fleet.plan` itself would bring torch.
_ORDER = ("weight", "bias", "shift", "scale", "mean", "var", "headers")


def bytes_by_role(rounds: Iterable[RoundReport]) -> dict[str, dict[str, int]]:
    """`up`, `down` → role of tensors or `headers` → bytes in all rounds.

    Both links have the same roles, in the same order: those that either sent.
    """
    sums: dict[str, Counter[str]] = {"up": Counter(), "down": Counter()}
    for report in rounds:
        for link, roles in report.bytes_by_role.items():
            sums.setdefault(link, Counter()).update(roles)
    seen = {role for roles in sums.values() for role, nbytes in roles.items() if nbytes}
    order = [*(role for role in _ORDER if role in seen), *sorted(seen - {*_ORDER})]
    return {link: {role: roles[role] for role in order} for link, roles in sums.items()}
