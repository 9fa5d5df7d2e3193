"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """A mistake in the input: the command line prints the message alone and exits with status 2.

    The message says what was found, what is allowed, and which option to change.
    """


class CheckpointError(Exception):
    """A written checkpoint is not what was meant to be written: exit status 1. The message says how it differs."""
