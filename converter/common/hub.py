"""Talking to the Hub: what is worth another try, and errors that keep the token to themselves."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from converter.common.errors import HubError, HybridizeError

Answer = TypeVar("Answer")

# Server errors and rate limits that pass; 412 says that somebody else committed meanwhile.
_PASSING = frozenset({408, 412, 429, 500, 502, 503, 504})
_LONGEST_WAIT_SECONDS = 60.0
# What a token of the Hub looks like, how it travels in a header, and a signed address's parameters.
_SECRETS = re.compile(r"hf_\w+|Bearer\s+\S+|(?<=\?)[^\s'\"]+", re.IGNORECASE)


@dataclass(frozen=True)
class RetryPolicy:
    """How long to go on when the Hub is busy or the line drops.

    The wait is doubled before each further attempt, unless the Hub says how long to wait.
    """

    attempts: int = 5
    first_wait_seconds: float = 1.0


def with_retries(
    act: Callable[[], Answer], policy: RetryPolicy, say: Callable[[str], None]
) -> Answer:
    """Do what is safe to repeat, again when a passing trouble stops it."""
    for attempt in range(1, policy.attempts):
        try:
            return act()
        except Exception as error:
            if not is_passing(error):
                raise
            wait = _wait_seconds(error, policy, attempt)
            say(f"{reason_of(error)}; trying again in {wait:.0f} s")
            time.sleep(wait)
    return act()


def is_passing(error: BaseException) -> bool:
    """Whether a trouble may be over in a moment: a busy server, a dropped connection."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HTTPError,
        LocalEntryNotFoundError,
    )

    # The client has looked into its cache because the network is away: that is no moment's matter.
    unplugged = isinstance(error, LocalEntryNotFoundError)
    for cause in _chain(error):
        if (status := _status(cause)) is not None:
            return status in _PASSING
        if not unplugged and isinstance(cause, (HTTPError, ConnectionError, TimeoutError)):
            return True
    return False


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _wait_seconds(error: BaseException, policy: RetryPolicy, attempt: int) -> float:
    for cause in _chain(error):
        headers = getattr(getattr(cause, "response", None), "headers", {})
        told = headers.get("Retry-After", "")
        if told.isdigit():
            return min(float(told), _LONGEST_WAIT_SECONDS)
    return float(min(policy.first_wait_seconds * 2 ** (attempt - 1), _LONGEST_WAIT_SECONDS))


def reason_of(error: BaseException) -> str:
    """What went wrong in one line, without anything that looks like a token or a signature."""
    told: list[str] = []
    for cause in _chain(error):
        lines = str(getattr(cause, "server_message", None) or cause).strip().splitlines()
        line = lines[0] if lines else type(cause).__name__
        if line not in told:
            told.append(line)
        if _status(cause) is not None:
            told[-1] += f" (status {_status(cause)})"
            break
    return _SECRETS.sub("***", "; ".join(told))


@contextmanager
def hub_errors(where: str) -> Iterator[None]:
    """Turn what the Hub's client raises into one clear HubError."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    log_in = "log in with: hf auth login"
    told: dict[type[Exception], dict[str, Any]] = {
        GatedRepoError: {
            "problem": "the Hub gives this model only to those whom its owner lets",
            "next_step": f"ask for access on its page, then {log_in}",
        },
        RepositoryNotFoundError: {
            "problem": "the Hub does not show such a repository",
            "next_step": f"check the spelling; for a private one, {log_in}",
        },
        RevisionNotFoundError: {"problem": "the repository has no such revision"},
        HFValidationError: {"problem": "this is not a Hub id", "expected": "OWNER/NAME"},
    }
    try:
        yield
    except HubError:
        raise
    except OfflineModeIsEnabled as error:
        offline = "the Hub is not asked, because the environment says offline"
        raise HubError(offline, where=where) from error
    except tuple(told) as error:
        said = next(said for kind, said in told.items() if isinstance(error, kind))
        raise HubError(**said, where=where, got=reason_of(error)) from error
    except (HTTPError, RuntimeError, ValueError, ConnectionError, TimeoutError) as error:
        denied = _status(error) in (401, 403)
        raise HubError(
            "the Hub refuses" if denied else "the Hub cannot be reached, or fails",
            where=where,
            got=reason_of(error),
            next_step="log in with a token that may write: hf auth login"
            if denied
            else "run the same command again: what arrived is not sent twice",
        ) from error


@contextmanager
def downloading(
    what: str, where: str, raised: type[HybridizeError], absent: str, *, offline: bool
) -> Iterator[None]:
    """Turn what goes wrong while something is taken from the Hub, or its cache, into one error.

    Args:
        what: what is taken, as one would say it.
        where: its name.
        raised: the error's class.
        absent: what to say when neither the Hub nor the cache has it.
        offline: whether only the cache was asked.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        with hub_errors(where):
            yield
    except LocalEntryNotFoundError as error:
        raise raised(
            absent,
            where=where,
            next_step="check the spelling"
            + (", or run once without --offline" if offline else " and the network"),
        ) from error
    except HubError as error:
        raise raised(
            f"the Hub does not give this {what}",
            where=where,
            got=f"{error.problem}: {error.details.get('got', '')}",
            next_step=error.details.get("next step"),
        ) from error
