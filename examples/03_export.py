"""Fold the value basis of a calibration into a model's weights, and use both together.

The export loads wherever transformers does; quantcache is needed for its cache only.
"""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from quantcache import Calibration, SpectralCache, data, export_checkpoint

output = sys.argv[1] if len(sys.argv) > 1 else "wiki11m-spectral"
report = export_checkpoint(data.demo_model_path(), Calibration.for_model("wiki11m"), output)
print(f"{report.tensors} tensors of {report.layers} layers changed; logits {report.difference}")

model = AutoModelForCausalLM.from_pretrained(output, attn_implementation="spectral")
cache = SpectralCache.from_pretrained(output, config=model.config)
tokenizer = AutoTokenizer.from_pretrained(output)
inputs = tokenizer("The capital of France", return_tensors="pt")
tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(tokens[0]))
