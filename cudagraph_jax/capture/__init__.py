"""How buckets come to be held: compiled, loaded, checked, warmed, evicted."""
