"""What a model's activations and cache allow: spectra, rate-distortion bounds, and predicted cost."""
