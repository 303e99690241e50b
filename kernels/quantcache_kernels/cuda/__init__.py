"""CUDA C++ kernels: decode attention on packed codes in tensor-core order, and encoding, compiled when first used.

``blocks`` says how blocks lie in memory and needs no GPU; ``compiler`` compiles by NVRTC, ``driver`` launches. Nothing
here imports anything but torch, and importing works on machines without CUDA.
"""
