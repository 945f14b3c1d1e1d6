"""Whether the Hugging Face hub can be reached, asked once before its libraries ask for files.

They ask for file after file, and without a network each one costs half a minute of retries, even
where everything that is needed lies in their cache.
"""

from __future__ import annotations

import time

_ATTEMPTS = 2  # names sometimes fail to resolve for a moment
_NO_WAY = {"ConnectError", "ConnectTimeout"}  # by name: of httpx or httpx2, with the hub's version


def unreachable() -> str | None:
    """Say why no connection to the hub can be made; None if one can.

    Any answer is one, and so is one that takes long: only a connection that cannot be made within
    `HF_HUB_ETAG_TIMEOUT` (10 s), twice, counts. Under `HF_HUB_OFFLINE` nothing is asked, and the
    answer is None: the hub's libraries then know themselves what to do.
    """
    # Slow to import, and needed for hub ids alone.
    from huggingface_hub import constants, get_session, is_offline_mode
    from huggingface_hub.errors import HTTPError

    if is_offline_mode():
        return None
    for attempt in range(_ATTEMPTS):
        time.sleep(attempt)
        try:
            get_session().head(
                constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT, follow_redirects=False
            )
        except HTTPError as error:
            if type(error).__name__ not in _NO_WAY:
                return None
            reason = str(error) or "no answer"
        else:
            return None
    return f"{constants.ENDPOINT} cannot be reached ({reason})"
