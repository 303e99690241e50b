"""Device kernels of quantcache; importing this package needs neither Triton nor a GPU."""
