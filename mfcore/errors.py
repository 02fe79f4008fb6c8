"""Error class that separates wrong input from internal errors, for all packages."""


class UserInputError(ValueError):
    """Wrong input of the user; the message contains the value and the fix.

    The command line prints the message of this class alone and exits with code 2. Any other ValueError is an internal
    error.
    """
