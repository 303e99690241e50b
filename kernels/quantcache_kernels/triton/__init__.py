"""Triton kernels for GPUs: encoding, decoding, and attention over packed codes, sinks and tail.

``ops`` holds the three operations, ``tables`` a codec's constants as they read them, ``runtime`` what differs where
Triton is missing or interpreted; the rest are the kernels. Importing ``ops`` imports Triton where it is installed.
"""
