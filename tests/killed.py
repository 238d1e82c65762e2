"""The exception by which tests end a run."""


class Killed(BaseException):
    """As sudden as SIGKILL, for the process that tests in it."""
