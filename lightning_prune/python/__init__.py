"""The commands as functions: the same configurations, runs and folders, exceptions instead of exit codes."""
