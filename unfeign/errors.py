"""The one error a user sees: what was expected, what was found, and where.

Everything a user can get wrong (a config key, a file, an adapter) raises `UnfeignError`; the command line prints it as
one line and exits with 2. Faults of the program itself keep their traceback.
"""


class UnfeignError(Exception):
    """A mistake in the input. `str()` gives one line.

    Args:
        expected: what would have been right.
        found: what was there instead.
        where: file, key or argument at fault.
    """

    def __init__(self, expected: str, found: str, where: str):
        super().__init__(" ".join(f"{where}: expected {expected}, found {found}".splitlines()))
        self.expected, self.found, self.where = expected, found, where
