"""The one kind of error that a user of ril_jax is meant to read."""


class InputError(ValueError):
    """Something that the user gave cannot be used: a config field, a file, a row, an image, a checkpoint, a flag.

    The message is one line that names the thing (file, row id or field) and the mend. Entry points print it as it is,
    without a traceback, and exit with status 2.
    """
