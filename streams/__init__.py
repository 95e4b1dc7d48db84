"""Streams, one file per scenario or data family."""
