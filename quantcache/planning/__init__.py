"""What fits, and which format to take: sizes from a config, figures from measurement records."""
