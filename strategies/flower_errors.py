"""Why there is an error in the place of a reply, in words that name what happened.

Flower's own texts for a device that is lost speak of its database.
"""

from flwr.app import Error
from flwr.common.constant import ErrorCode

_LOST = {
    ErrorCode.MESSAGE_UNAVAILABLE: "lost on its way: the device, or its link, was gone as it sent",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "lost on its way: the reply came, and was kept too long",
    ErrorCode.NODE_UNAVAILABLE: "the device is offline: it was not heard of for about a minute",
}


def reason_of(error: Error) -> str:
    """In one line for what Flower itself says, else what the client gave as its reason.

    Args:
        error: in the place of a reply. A client could send one with any code: that changes
            the words, and nothing else.
    """
    return _LOST.get(error.code) or error.reason or "error without a reason"
