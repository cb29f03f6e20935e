"""The one exception that means "the user can mend it"."""


class UserError(Exception):
    """A mistake in a flag, file, row or setting.

    The message is one line, `where: what is wrong: how to mend it`; the command line prints it
    without a traceback and exits with code 2.
    """
