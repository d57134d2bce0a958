"""The errors that several rooms raise: a mistake of the user's, and numbers that are none; and what
is told of a library's errors.
"""


class UserError(ValueError):
    """A mistake in what was asked for or in a file that was given.

    Its text is one line that names the offending key or path, its value, the bound it breaks and
    the remedy; commands print that line and nothing else. Every other exception is treated as a
    fault of the program and keeps its traceback. It is a ValueError, so that code which uses the
    package as a library can catch it as one.
    """


class NotFinite(RuntimeError):
    """A gradient, advantage or weight is infinite or NaN, and so would be all that follows."""


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message, or its type where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
