"""The C structures of ``src/abi.h``."""

from __future__ import annotations

import ctypes
import struct

ABI = 8
"""Version of the structures; a library of another version is refused."""

_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class Side(ctypes.Structure):
    """The constants of the keys or the values of one layer."""

    _fields_ = (
        ("dim", _INT),
        ("slow", _INT),
        ("slow_pairs", _INT),
        ("fast_pairs", _INT),
        ("words", _INT),
        ("map_columns", _INT),
        ("num_factors", _INT),
        ("trellis", _INT),
        ("counts", _POINTER),
        ("coded", _POINTER),
        ("order", _POINTER),
        ("frequencies", _POINTER),
        ("mean", _POINTER),
        ("map", _POINTER),
        ("fast_map", _POINTER),
        ("offset_cos", _POINTER),
        ("offset_sin", _POINTER),
        ("levels", _POINTER),
        ("planes", _POINTER),
        ("gains", _POINTER),
        ("encoder", _POINTER),
        ("weights", _POINTER),
        ("trees", _POINTER),
        ("factors", _POINTER),
        ("unions", _POINTER),
        ("subsets", _POINTER),
        ("decoder", _POINTER),
    )


class Dense(ctypes.Structure):
    """A tensor ``[B, H, tokens, dimension]``, strides in elements."""

    _fields_ = (("data", _POINTER), ("batch_stride", _LONG), ("head_stride", _LONG), ("token_stride", _LONG))


class Encode(ctypes.Structure):
    """Arguments of ``quantcache_encode``."""

    _fields_ = (
        ("side", ctypes.POINTER(Side)),
        ("batch", _INT),
        ("heads", _INT),
        ("blocks", _INT),
        ("dtype", _INT),
        ("x", Dense),
        ("block_table", _POINTER),
        ("left_padding", _POINTER),
        ("codes", _POINTER),
        ("gains", _POINTER),
        ("threads", _INT),
        ("level", _INT),
    )


class Decode(ctypes.Structure):
    """Arguments of ``quantcache_decode``."""

    _fields_ = (
        ("side", ctypes.POINTER(Side)),
        ("batch", _INT),
        ("heads", _INT),
        ("blocks", _INT),
        ("codes", _POINTER),
        ("gains", _POINTER),
        ("block_table", _POINTER),
        ("left_padding", _POINTER),
        ("out", _POINTER),
        ("threads", _INT),
        ("level", _INT),
    )


class Past(ctypes.Structure):
    """What many calls of ``quantcache_attend`` have in common."""

    _fields_ = (
        ("key", ctypes.POINTER(Side)),
        ("value", ctypes.POINTER(Side)),
        ("batch", _INT),
        ("heads", _INT),
        ("blocks", _INT),
        ("num_sinks", _INT),
        ("dense_dtype", _INT),
        ("sinks", Dense * 2),
        ("key_codes", _POINTER),
        ("value_codes", _POINTER),
        ("key_gains", _POINTER),
        ("value_gains", _POINTER),
        ("block_table", _POINTER),
        ("left_padding", _POINTER),
        ("encoded_end", _LONG),
    )


CALL = struct.Struct("7i2f17q")
"""``Call``, the rest of the arguments of ``quantcache_attend``: written at once, since every step makes one."""
