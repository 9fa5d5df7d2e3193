"""Errors, files, progress, devices and memory, for every other room."""
