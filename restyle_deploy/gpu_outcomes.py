"""What became of a check on a GPU: whatever one raises does not stop the others."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from restyle_deploy.errors import BackendUnavailableError, RestyleDeployError, VerificationError

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a check.

    Attributes:
        status: `not run` where something that it needs is missing.
        detail: what was found, or the reason.
    """

    status: Literal["passed", "failed", "not run"]
    detail: str


def outcome_of(check: Callable[[], str]) -> Outcome:
    """Run a check; whatever it raises is an outcome, so that the rest goes on.

    Args:
        check: returns what was found, or raises: `BackendUnavailableError` where it cannot run here.
    """
    try:
        return Outcome(status="passed", detail=check())
    except BackendUnavailableError as error:
        return Outcome(status="not run", detail=str(error))
    except RestyleDeployError as error:
        return Outcome(status="failed", detail=str(error))
    except Exception as error:  # libraries of the device raise what they like
        _logger.exception("a check ended with an error")
        return Outcome(status="failed", detail=f"{type(error).__name__}: {error}")


def join_outcomes(outcomes: Mapping[str, Outcome]) -> str:
    """Return what the parts of a check have found, by name.

    Raises:
        VerificationError: a part failed; the message has all of them.
        BackendUnavailableError: none could run.
    """
    details = "; ".join(f"{name} {outcome.status}: {outcome.detail}" for name, outcome in outcomes.items())
    statuses = {outcome.status for outcome in outcomes.values()}
    if "failed" in statuses:
        raise VerificationError(details)
    if "passed" not in statuses:
        raise BackendUnavailableError(details)
    return details
