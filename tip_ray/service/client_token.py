"""Bearer tokens: read from files, never from arguments, and never shown."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from tip_ray.contract.errors import AccessError

RAY_TOKEN, RAY_TOKEN_PATH, RAY_MODE = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"
RAY_TOKEN_FILE = "~/.ray/auth_token"  # noqa: S105 - a place, not a token
_MAX_BYTES = 16 * 1024


def read_token(path: str | Path) -> str:
    """The token in a file, white space around it dropped.

    Raises:
        AccessError: no such file, or not one line of visible ASCII.
    """
    try:
        with Path(path).expanduser().open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise AccessError(
            f"token_file: {path} cannot be read ({error.strerror}); name a file with the token"
        ) from None
    return _checked(content.decode("latin-1"), f"token_file: {path}")


def ray_token(
    token_file: str | Path | None, environment: Mapping[str, str] | None = None
) -> str | None:
    """The token for a Ray cluster: of `token_file`, else from where Ray itself takes it.

    That is RAY_AUTH_TOKEN, then the file that RAY_AUTH_TOKEN_PATH names, then ~/.ray/auth_token;
    none of them if RAY_AUTH_MODE is `disabled`.

    Raises:
        AccessError: as `read_token`.
    """
    environment = os.environ if environment is None else environment
    if token_file is not None:
        return read_token(token_file)
    if environment.get(RAY_MODE) == "disabled":
        return None
    if token := environment.get(RAY_TOKEN):
        return _checked(token, RAY_TOKEN)
    if path := environment.get(RAY_TOKEN_PATH):
        return read_token(path)
    default = Path(RAY_TOKEN_FILE).expanduser()
    return read_token(default) if default.is_file() else None


def _checked(text: str, name: str) -> str:
    token = text.strip()
    if not token or len(token) > _MAX_BYTES or not all("!" <= char <= "~" for char in token):
        raise AccessError(f"{name} holds no token; expected one line of visible ASCII, no spaces")
    return token
