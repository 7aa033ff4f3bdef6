"""The error of this package."""


class ServerError(RuntimeError):
    """TorchServe could not be started. The message says why and what to do."""
