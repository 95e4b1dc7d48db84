"""Learning strategies, one file per method."""
