"""Which implementation encodes blocks and attends on them, and what it may read."""
