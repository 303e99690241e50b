"""Calibrate a model, look at the result and save it.

Runs as it is on the small model that comes with quantcache; for another model change the first lines.
"""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from quantcache import Calibration, calibrate
from quantcache.data import calibration_text, demo_model_path

model_name = demo_model_path()  # or "Qwen/Qwen3-0.6B"
text = calibration_text()  # or plain text of the kind that the model will read
folder = sys.argv[1] if len(sys.argv) > 1 else "calibration"

model = AutoModelForCausalLM.from_pretrained(model_name, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(model_name)

calibration = calibrate(model, text, tokenizer, bits=3.0, max_tokens=4096)
calibration.save_pretrained(folder)
print(f"{calibration} saved in {folder}: {calibration.bits_per_element:.3f} bits per element with gains")

# The calibration serves any number of bits: no second run of the model is needed.
for bits in (2, 2.5, 4):
    other = Calibration.from_pretrained(folder).with_bits(bits)
    print(f"at {bits} bits: {other.bits_per_element:.3f} bits per element")
