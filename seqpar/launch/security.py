"""Ray's token: always on, readable by its owner alone, never printed.

Ray 2.60 starts local clusters with a token that it writes world-readable, and joins others without
one unless asked. Here the token is made or mended before Ray is imported, since Ray reads its
authentication mode at import.
"""

from __future__ import annotations

import os
import secrets
import stat
import sys
from pathlib import Path

from seqpar.errors import LaunchError

__all__ = ["ensure_token", "is_loopback", "require_token", "token_environment"]

DEFAULT_TOKEN = Path("~/.ray/auth_token")


def token_path() -> Path:
    """Where the token is: RAY_AUTH_TOKEN_PATH, or Ray's own default."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or DEFAULT_TOKEN).expanduser()


def ensure_token(path: Path) -> None:
    """Make a token if there is none, and close the file to everyone but its owner.

    Raises:
        LaunchError: the file is another user's, or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            path.chmod(0o600)
    except OSError as error:
        raise LaunchError(
            f"Ray's token file {path} cannot be made private ({error.strerror}): "
            "set RAY_AUTH_TOKEN_PATH to a file of yours"
        ) from None


def token_environment() -> dict[str, str]:
    """The variables that turn Ray's authentication on; the token itself is never among them."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return {"RAY_AUTH_MODE": "token"}
    path = token_path()
    ensure_token(path)
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


def enable_token_auth() -> None:
    """Turn authentication on for this process; call before anything imports Ray.

    Raises:
        LaunchError: Ray was imported before, with authentication off.
    """
    if "ray" in sys.modules and os.environ.get("RAY_AUTH_MODE") != "token":
        raise LaunchError(
            "Ray was imported before seqpar could turn its token authentication on: set "
            "RAY_AUTH_MODE=token in the environment, or import ray after seqpar.launch.jobs"
        )
    os.environ.update(token_environment())


def require_token(address: str) -> None:
    """Refuse to talk to another machine without its token.

    Raises:
        LaunchError: neither RAY_AUTH_TOKEN is set nor a token file there.
    """
    if not os.environ.get("RAY_AUTH_TOKEN") and not token_path().exists():
        raise LaunchError(
            f"{address} is not this machine and there is no token for it: put the cluster's token "
            f"into {token_path()} (mode 0600), or set RAY_AUTH_TOKEN_PATH to where it is"
        )


def is_loopback(host: str) -> bool:
    """Whether an address or name means this machine alone."""
    return host in ("localhost", "::1") or host.startswith("127.")
