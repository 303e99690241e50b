"""From a model and text to a calibration, and how good it proves."""

from quantcache.calibration.calibrator import calibrate as calibrate
