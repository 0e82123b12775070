"""Trying again: which failures of a remote store pass by themselves, and how long to wait.

Waits double and are spread at random, so that a thousand ranks that met the same failure do not all
come back in the same moment.
"""

import logging
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from data_pipeline.errors import DamagedFileError, DataError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# pyarrow names an error of S3 in the text alone. What is not listed is taken for a passing failure:
# throttling, 5xx, a connection that was reset, refused, too slow or closed early.
_MISSING_TEXT = re.compile(r"NO_SUCH_BUCKET|NO_SUCH_KEY|RESOURCE_NOT_FOUND|HTTP status 404")
_DENIED_TEXT = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|SIGNATURE_DOES_NOT_MATCH"
    r"|INVALID_SIGNATURE|INCOMPLETE_SIGNATURE|MISSING_AUTHENTICATION_TOKEN|UNRECOGNIZED_CLIENT"
    r"|REQUEST_EXPIRED|REQUEST_TIME_TOO_SKEWED|HTTP status 40[13]"
)
_REFUSED_TEXT = re.compile(r"HTTP status (3\d\d|4(?!08|29)\d\d)")


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often one request is tried; a download counts anew after every piece that arrived."""

    attempts: int = 8
    first_delay_seconds: float = 0.2
    max_delay_seconds: float = 20.0
    total_seconds: float = 300.0
    """No further attempt is made once this long has passed since the first."""


class Attempts:
    """The attempts at one request."""

    def __init__(self, policy: RetryPolicy, what: str) -> None:
        self._policy = policy
        self._what = what
        self._count = 0
        self._begun = time.monotonic()

    def failed(self, error: Exception) -> None:
        """Wait for the next attempt.

        Raises:
            DataError: if another attempt is of no use, or there was the last.
        """
        if isinstance(error, DataError):
            raise error  # says all there is to say
        policy = self._policy
        self._count += 1
        reason = " ".join(str(error).split()) or type(error).__name__
        cure = cure_for(error)
        if cure is not None:
            kind = DamagedFileError if is_missing(error) else DataError
            raise kind(f"{self._what}: {reason}; {cure}") from error
        delay = min(policy.max_delay_seconds, policy.first_delay_seconds * 2 ** (self._count - 1))
        # No seed: the point of the jitter is that processes differ.
        delay *= random.SystemRandom().uniform(0.5, 1.0)
        seconds = time.monotonic() - self._begun
        if self._count >= policy.attempts or seconds + delay > policy.total_seconds:
            raise DataError(
                f"{self._what}: failed {self._count} times in {seconds:.0f} s, the last time with: "
                f"{reason}; check the network and the store, then start again"
            ) from error
        logger.warning(
            "%s: attempt %d of %d failed (%s), next in %.1f s",
            self._what, self._count, policy.attempts, reason, delay,
        )  # fmt: skip
        time.sleep(delay)


def cure_for(error: Exception) -> str | None:
    """Say what to do about a failure that stays; None if it may pass by itself."""
    text = str(error)
    if isinstance(error, _MISSING) or _MISSING_TEXT.search(text):
        return "there is no such file, folder or bucket: check the URL"
    if isinstance(error, PermissionError) or _DENIED_TEXT.search(text):
        return "access is denied: check the credentials (for S3 AWS_ACCESS_KEY_ID and the like)"
    if isinstance(error, ValueError | TypeError | NotImplementedError):
        return "the store does not take this request: check the URL"
    if _REFUSED_TEXT.search(text):
        return "the store refuses the request: check URL, region and endpoint"
    return None


def is_missing(error: Exception) -> bool:
    """Tell a file that is not there from other failures."""
    return isinstance(error, _MISSING) or bool(_MISSING_TEXT.search(str(error)))


def retry(
    action: Callable[[], Result],
    *,
    what: str,
    policy: RetryPolicy,
    errors: tuple[type[Exception], ...],
) -> Result:
    """Do something until it succeeds.

    Args:
        action: may be done more than once.
        what: begins the message, such as a URL.
        policy: how often.
        errors: what a failure raises.

    Raises:
        DataError: naming the last reason, if it does not succeed.
    """
    attempts = Attempts(policy, what)
    while True:
        try:
            return action()
        except errors as error:
            attempts.failed(error)
