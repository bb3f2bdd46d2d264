"""What is wrong with a disk, in plain words, where libraries say it at length."""

from __future__ import annotations

import errno
import logging

_ERRNOS = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is larger than allowed here",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a file stands where the folder should be",
    errno.EIO: "the device reports an input/output error",
}
_WORDS = {
    "no space left": errno.ENOSPC,
    "disk quota": errno.EDQUOT,
    "file too large": errno.EFBIG,
    "read-only file system": errno.EROFS,
    "permission denied": errno.EACCES,
}


class NoTracebacks(logging.Filter):
    """Holds back what orbax's threads log of a full disk, four tracebacks long: save() or wait() say it in one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        return error is None or "orbax" not in record.pathname or reason(error) is None


def reason(error: BaseException | None) -> str | None:
    """Plain words if this error, or one behind it, is the disk's; tensorstore gives only text."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _ERRNOS:
            detail = f" ({error.strerror})" if error.errno == errno.ENOSPC and "needed" in str(error.strerror) else ""
            return _ERRNOS[error.errno] + detail
        for words, number in _WORDS.items():
            if words in str(error).lower():
                return _ERRNOS[number]
        error = error.__cause__ or error.__context__
    return None
