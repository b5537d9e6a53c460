"""What the node keeps on disk between two runs: counters, never the content of a unit."""
