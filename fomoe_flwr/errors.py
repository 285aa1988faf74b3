"""The two ways in which a command ends without success; both carry one line for people."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable


class InputError(ValueError):
    """Input that cannot be used: nothing was started (exit status 2)."""


class SettingsError(InputError):
    """A setting that cannot be used; the message names value, allowed range and key."""


class RunError(RuntimeError):
    """A run that could not go on (exit status 1)."""


def check_text(words: Iterable[str]) -> None:
    """Refuse text that no file could store. Raises InputError, one line."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{word!a} holds bytes that are no UTF-8: type the text anew, or rename the file"
            ) from None


_WAYS_ON = {
    errno.ENOENT: "make its folder",
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "permit it"),
}


def refusal(error: OSError) -> str:
    """Say in one line what the operating system refused: the path, why, and what to do."""
    where = f"{error.filename}: " if error.filename else ""
    way_on = _WAYS_ON.get(error.errno or 0, "mend it")
    return f"{where}{error.strerror or one_line(error)}: {way_on}, or name another place"


def reason_of(error: BaseException) -> str:
    """Say in one line what went wrong; only a fault of the program is named after its class."""
    if isinstance(error, OSError):
        return refusal(error)
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return "interrupted: it was told to end"
    text = one_line(error)
    if isinstance(error, ValueError | RuntimeError) and text:  # Ours are such, too.
        return text
    return f"a fault in the program ({type(error).__name__}{': ' * bool(text)}{text})"


def one_line(error: object) -> str:
    """Fold an error's text into one line."""
    return re.sub(r"\s+", " ", str(error)).strip()
