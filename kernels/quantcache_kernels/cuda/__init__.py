"""CUDA C++ kernels: decode attention on packed codes in tensor-core order, compiled by NVRTC when first used.

``blocks`` says how blocks lie in memory and needs no GPU; ``driver`` compiles and launches. Nothing here imports
anything but torch, and importing works on machines without CUDA.
"""
