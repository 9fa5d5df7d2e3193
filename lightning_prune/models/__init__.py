"""A path or hub id → ``Checkpoint``; families as records; layers one by one."""
