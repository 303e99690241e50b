"""Generate from a compressed cache. Run 01_calibrate.py first."""

from __future__ import annotations

import os
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from quantcache import SpectralCache
from quantcache.data import demo_model_path, evaluation_text

model_name = demo_model_path()
folder = sys.argv[1] if len(sys.argv) > 1 else "calibration"
if folder == "calibration" and not os.path.isdir(folder):
    sys.exit(f"there is no folder {folder} yet: run 01_calibrate.py first")

# Importing quantcache registers "spectral" with transformers. It attends on the codes; "sdpa" and "eager" work too.
model = AutoModelForCausalLM.from_pretrained(model_name, dtype="float32", attn_implementation="spectral")
tokenizer = AutoTokenizer.from_pretrained(model_name)
prompt = evaluation_text()[:3500].rsplit(". ", 1)[0] + "."
inputs = tokenizer(prompt, return_tensors="pt")

cache = SpectralCache.from_pretrained(folder, config=model.config)
output = model.generate(**inputs, past_key_values=cache, max_new_tokens=24, do_sample=False)

print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :]))
print(cache.memory())
