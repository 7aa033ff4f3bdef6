"""Our archive against other servers: `python -m benchmarks.serving`."""
