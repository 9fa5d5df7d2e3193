"""A configuration → a run folder, and an experiment of many."""
