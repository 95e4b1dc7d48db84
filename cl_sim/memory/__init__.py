"""Memories: rows on the device, a rule for who leaves, a rule for who is drawn."""
