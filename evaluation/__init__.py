"""From networks and frames to per-image confusion matrices, and from those to every table."""
