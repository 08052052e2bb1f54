"""The errors of this room."""


class TrainingError(ValueError):
    """A cell cannot be trained as asked: says what, where, the value and the fix."""
