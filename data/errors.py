"""What a user's data can do wrong."""


class DataError(Exception):
    """The data a config names cannot be used: one sentence with what was found and what would do."""
