"""Measurements, each taken through the real cache."""
