"""The data plane's user-facing error: says what, where, the value found and the fix. Nothing else lives here."""


class DataError(ValueError):
    """A dataset, shard, subset or loader request that cannot be honoured; the message carries the fix."""
