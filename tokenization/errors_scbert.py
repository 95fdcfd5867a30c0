"""The error that asks a user to mend the input; it stands alone so that importing it takes no time."""


class InputError(ValueError):
    """Something in the input has to be mended; the message says what was found, what was needed and how to mend it."""
