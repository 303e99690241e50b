"""The cache: layers of packed blocks, what keeps them in step, on disk, and in every ``generate()`` of a model."""

from quantcache.cache.enabling import disable as disable
from quantcache.cache.enabling import enable as enable
from quantcache.cache.enabling import enabled as enabled
from quantcache.cache.graphs import DecodeGraph as DecodeGraph
from quantcache.cache.graphs import decode_graphs as decode_graphs
from quantcache.cache.layer import SpectralLayer as SpectralLayer
from quantcache.cache.prefixes import PrefixStatistics as PrefixStatistics
from quantcache.cache.prefixes import PrefixStore as PrefixStore
from quantcache.cache.spectral_cache import BlockCache as BlockCache
from quantcache.cache.spectral_cache import SpectralCache as SpectralCache
