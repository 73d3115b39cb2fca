"""Un-prompted features computed once and kept."""
