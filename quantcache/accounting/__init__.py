"""The only source of sizes: bytes and bits of caches, measured and predicted."""

from quantcache.accounting.measuring import measure as measure
from quantcache.accounting.memory import CacheMemory as CacheMemory
from quantcache.accounting.memory import bits_per_encoded_element as bits_per_encoded_element
from quantcache.accounting.predicting import predict as predict
