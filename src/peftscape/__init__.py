"""peftscape."""
