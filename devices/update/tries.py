"""How often, and how long, a device tries to get bytes that do not come.

1. Everything ends at the deadline.
2. A failure that trying again cannot mend ends it at once; so do `MAX_TRIES` failures with no progress between them.
3. The waits grow fourfold up to a minute, spread at random: a fleet that lost its server must not come back as one.
4. The server's `Retry-After` is kept; where it lies past the deadline, there is nothing to wait for.
"""

from __future__ import annotations

import random
import time

from edge_ilseg.devices.update.transport import TransportError

MAX_TRIES = 10
FIRST_WAIT_S = 0.01
"""Short: a connection that is cut after some progress is the usual case, and goes on at once."""
MAX_WAIT_S = 60.0


class Tries:
    """Counts failures, and waits between them."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._end = time.monotonic() + deadline_s
        self._failures = 0

    def progressed(self) -> None:
        """Something arrived: the count of failures begins anew.

        Raises:
            TransportError: it is past the deadline (rule 1).
        """
        self._failures = 0
        if time.monotonic() > self._end:
            raise TransportError(
                "the bytes come too slowly",
                found=f"not finished within {self._deadline_s:g} s",
                hint="run it again: it goes on where it stopped",
                is_transient=True,
            )

    def failed(self, error: TransportError) -> None:
        """Wait before the next try.

        Raises:
            TransportError: `error`, when there is to be no other try (rules 1, 2 and 4).
        """
        self._failures += 1
        if not error.is_transient or self._failures >= MAX_TRIES:
            raise error
        wait_s = max(wait_before(self._failures), error.retry_after_s or 0.0)
        if time.monotonic() + wait_s > self._end:
            raise error
        time.sleep(wait_s)


def wait_before(failures: int) -> float:
    """Seconds to wait after so many failures in a row (rule 3)."""
    longest_s = min(MAX_WAIT_S, FIRST_WAIT_S * 4.0 ** min(failures - 1, 20))
    return random.uniform(longest_s / 2, longest_s)
