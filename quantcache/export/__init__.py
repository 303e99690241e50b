"""Checkpoints with the value basis folded into their weights."""

from __future__ import annotations

from quantcache.common.choices import BASES, Basis
from quantcache.export.exporter import export_checkpoint
from quantcache.export.model import absorb
from quantcache.export.report import ExportReport

__all__ = ["BASES", "Basis", "ExportReport", "absorb", "export_checkpoint"]
