"""A checkpoint and windows of text → perplexity, distance from the dense model, cost, zero-shot accuracy."""
