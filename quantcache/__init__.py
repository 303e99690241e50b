"""Run-time KV-cache compression for Hugging Face transformers: packed low-bit keys and values, attended on directly."""

from __future__ import annotations

__version__ = "0.1.0"
