"""A plan and the dense checkpoint → the pruned folder, read back and compared."""
