"""The errors that users cause and can mend."""


class InputError(Exception):
    """Bad input from outside: a config, a path, a shard, an export or an image.

    The message is one line that says what is wrong, where, and what to do. Command lines print it and exit with 2.
    """


class StopRequested(Exception):
    """A signal asked the run to stop; its state has been saved. Command lines exit with 75 (EX_TEMPFAIL)."""
