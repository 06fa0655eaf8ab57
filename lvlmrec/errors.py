"""Errors that are the user's to mend: they end a job with exit status 2 and one line."""


class InputError(ValueError):
    """A configuration or an input is wrong; the message names the thing, the value and the choices."""


class ConfigError(InputError):
    """A configuration key or value is wrong."""


class JobFailed(RuntimeError):
    """A job ran and could not reach its result; it ends with exit status 1 and one line."""
