"""The exception with which tests end a run."""


class Killed(BaseException):
    """Ends a run as abruptly as SIGKILL, inside the test process."""
