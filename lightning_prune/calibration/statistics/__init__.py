"""Activations and gradients of one layer → sums that do not depend on batches, order or processes."""
