"""What a model's activations and cache allow, what quantcache makes of it, and a report of both."""

from __future__ import annotations

from quantcache.analysis.analyzer import analyze
from quantcache.analysis.report import Report, ReportError
from quantcache.artifact.prediction import predict_kl, predict_kl_at

__all__ = ["Report", "ReportError", "analyze", "predict_kl", "predict_kl_at"]
