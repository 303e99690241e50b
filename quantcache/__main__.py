"""``python -m quantcache``."""

from __future__ import annotations

from quantcache.cli import main

if __name__ == "__main__":
    main()
