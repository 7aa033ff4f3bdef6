"""How a rollout can end other than well, and why."""

from __future__ import annotations

import requests


class Mistake(ValueError):
    """What was asked for cannot be done, and nothing was changed."""


class Failed(RuntimeError):
    """The new version does not serve. The message says why, and what serves now."""


class Unfinished(RuntimeError):
    """The new version serves, and step 6 could not be done."""


def reason(error: BaseException) -> str:
    """In one line."""
    if isinstance(error, requests.RequestException):
        return f"{error.request.url if error.request else 'the server'} does not respond ({type(error).__name__})"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return str(error) or type(error).__name__
