"""Ray's token authentication for a private cluster; must act before `import ray`."""

from __future__ import annotations

import os
import secrets

MODE, TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"


def require_a_token(address: str | None) -> None:
    """Guard the private cluster that is about to be started with a token of this process.

    Ray's ports listen on every interface, and Ray reads its settings when it is imported. A
    setting of the user's own stands; for a cluster that exists, its own setting counts.
    """
    if address or os.environ.get("RAY_ADDRESS") or MODE in os.environ:
        return
    os.environ[MODE] = "token"
    os.environ.setdefault(TOKEN, secrets.token_hex(32))
