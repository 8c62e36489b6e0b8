"""Reading what a spec names: whatever goes wrong becomes one SpecError line."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from tip_ray.contract.errors import SpecError

# Bad content is a ValueError (JSON, UTF-8, Arrow) or the decompressor's own error.
_ERRORS = (OSError, ImportError, ValueError, EOFError, zlib.error, lzma.LZMAError)
# Packages of file systems whose errors are none of these.
_STORE_PACKAGES = frozenset(
    {"botocore", "aiobotocore", "s3fs", "gcsfs", "google", "adlfs", "azure", "aiohttp", "httpx"}
)


@contextmanager
def readable(field: str, source: str, expected: str, cure: str) -> Iterator[None]:
    """Turn errors of file systems and of broken content into a SpecError.

    Args:
        field: the spec's name for `source`.
        source: the path or URL being read.
    """
    try:
        yield
    except BaseException as error:
        package = type(error).__module__.partition(".")[0]
        if not isinstance(error, _ERRORS) and package not in _STORE_PACKAGES:
            raise
        raise SpecError(field, f"{source}: {one_line(error)}", expected, cure) from None


def one_line(error: BaseException) -> str:
    """The error's text, or its type where it has none; at most 200 characters."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
