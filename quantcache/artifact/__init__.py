"""Calibrations: the object users load and share, its files, its model card, the Hub, the model it belongs to."""

from quantcache.artifact.calibration import Calibration as Calibration
