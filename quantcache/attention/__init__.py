"""Attention on codes, the function that transformers calls, and the tensors that stand for packed keys and values."""

from quantcache.attention.function import dense_attention as dense_attention
from quantcache.attention.function import register_attention as register_attention
from quantcache.attention.function import spectral_attention as spectral_attention
from quantcache.attention.function import spectral_attention_forward as spectral_attention_forward
