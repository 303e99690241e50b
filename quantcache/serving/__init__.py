"""transformers' OpenAI-compatible server with compressed caches; needs ``quantcache[serve]``."""
