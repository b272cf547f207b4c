"""What a run says: scalars, their files and services, progress on the terminal, log lines."""
