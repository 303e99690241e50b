"""The only source of sizes: bytes and bits of caches, measured and predicted."""

from quantcache.accounting.measuring import measure as measure
from quantcache.accounting.memory import CacheMemory as CacheMemory
