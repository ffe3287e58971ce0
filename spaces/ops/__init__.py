"""What lanes compute, in plain torch: every tensor has a leading lane dimension."""
