"""Default values. Imports nothing: the command line shows them before anything is loaded."""

from __future__ import annotations

SINK_LENGTH = 4
"""First tokens of every row that stay in the model's dtype."""

RESIDUAL_LENGTH = 64
"""Recent tokens that stay in the model's dtype, at least."""

CHUNK = 64
"""Tokens fed at once when a cache's fidelity is measured: each chunk reads what the earlier ones left in it."""

PREFILL_CHUNK = 512
"""Prompt tokens that go through the model at once."""

QUALITIES = {"near-lossless": 0.001, "balanced": 0.005, "small": 0.02}
"""Largest mean KL divergence, in nats per token, that each word for a rate allows; the best first.

What these limits mean, as measured: docs/using-a-cache.md.
"""

COLDEST = 1e-5
"""Temperatures below are 0: a division by them would leave float32."""
