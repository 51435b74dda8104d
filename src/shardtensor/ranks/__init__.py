"""Ranks without a cluster: simulated, as worker processes, rehearsed, held against one device."""
