"""What tells that memory is short: in messages of libraries, of the driver, and of this package."""

import re

# Not the advice of `runtime.device.REMEDY`, which stands behind other failures of a GPU too.
_TELLING = re.compile(
    r"more memory than there is|out.?of.?memory|not enough (free )?memory|bad.?alloc|STATUS_ALLOC_FAILED|"
    r"allocate memory|memory.{0,40} could not be allocated",
    re.IGNORECASE,
)


def find_short_memory(message: str) -> str | None:
    """Return the words of a message that tell that memory is short; None where none do."""
    found = _TELLING.search(message)
    return found[0] if found else None
