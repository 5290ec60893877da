"""Why a SuperNode ended, in words, and what to do about it.

Flower 1.41 says little: it ends with 1 while the server still counts the node as
online, and for a key that is not registered; with 0, as on purpose, if its clock is
off or its key was revoked while it ran.
"""

from dataclasses import dataclass

from fleet.deploy.bundle import Bundle
from fleet.deploy.device_status import Seen
from fleet.deploy.supernode import HALF_DEAD
from fleet.deploy.supervisor import Ending

SOON_SECONDS = 5.0
SLOWLY_SECONDS = 60.0  # where somebody has to do something first

_NOT_ACTIVATED = "[code: 2004]"
_ERROR_MARKS = ("ERROR", "Error", "Exception", "error:")


@dataclass(frozen=True)
class Diagnosis:
    """What an ending means.

    Attributes:
        reason: with the way out, if somebody has to take it.
        pause: seconds to wait at least before the next start.
    """

    reason: str
    pause: float


def diagnose(ending: Ending, seen: Seen, bundle: Bundle) -> Diagnosis | None:
    """Why the SuperNode ended; None: nothing is known beyond how.

    Args:
        ending: of its process.
        seen: what the server says of this device now.
        bundle: that it was started with.
    """
    if seen.clock_is_off:
        return Diagnosis(
            f"this device's clock is {_off_by(seen.clock_offset)} the server's, and the server "
            f"takes at most 5 s ahead and 305 s behind; let it synchronise: timedatectl "
            f"set-ntp true",
            SOON_SECONDS,
        )
    if seen.status == "unknown":
        return Diagnosis(
            f"the server at {bundle.server} does not know the key of {bundle.name}: it was taken "
            f"out, or the bundle is another server's; on the server: fleet provision --add NAME, "
            f"then start here with the new bundle. It is tried again all the same",
            SLOWLY_SECONDS,
        )
    if seen.status == "refused":
        return Diagnosis(
            f"{seen.problem}; its bundle or its clock is damaged: give it its bundle again with "
            f"--bundle",
            SLOWLY_SECONDS,
        )
    if seen.status == "unreachable":
        return Diagnosis(
            f"the server at {bundle.server} cannot be reached ({seen.problem})", SOON_SECONDS
        )
    if ending.code == HALF_DEAD:
        return Diagnosis(f"it was alive in part only ({last_error(ending.tail)})", 0.0)
    if any(_NOT_ACTIVATED in line for line in ending.tail):
        if seen.status != "online":  # its key came, or its minute was over, just now
            return Diagnosis("the server did not let this device in then, and does now", 0.0)
        return Diagnosis(
            "the server still counts this device as online from before; it lets it in within a "
            "minute, or else its bundle is in use on another device too: give each its own, "
            "fleet provision --add NAME",
            SOON_SECONDS,
        )
    if ending.code == 0:  # what Flower does when it is refused, and nobody has asked it to end
        return Diagnosis("the server refused its key or clock then, and does not now", 0.0)
    return last_words(ending)


def last_words(ending: Ending) -> Diagnosis | None:
    """What a process said last; one that was killed had no time to say why."""
    return None if ending.code < 0 else Diagnosis(last_error(ending.tail), 0.0)


def last_error(tail: tuple[str, ...]) -> str:
    """The last line that names an error, or else the last line."""
    lines = [line.strip() for line in tail if line.strip()]
    errors = [line for line in lines if any(mark in line for mark in _ERROR_MARKS)]
    return (errors or lines or ["it said nothing"])[-1][:300]


def _off_by(offset: float) -> str:
    return f"{abs(offset):.0f} s {'ahead of' if offset > 0 else 'behind'}"
