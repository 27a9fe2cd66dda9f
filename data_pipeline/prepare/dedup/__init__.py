"""Which documents are the same, or nearly: keys of each part (keys.py), then one decision over all (clusters.py)."""
