"""The error that a user can put right, and how its message quotes a word.

Imports the standard library only: the command raises it before anything else is loaded.
"""

import shlex


class UserError(ValueError):
    """Something the user can put right; the message names the setting or path, what it is, and what to do."""


def quoted(word: object) -> str:
    """Returns a word for a command that a message shows, such as a path with blanks or brackets."""
    return shlex.quote(str(word))
