"""Finished runs → audit, tables and report."""
