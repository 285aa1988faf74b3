"""A run's directory, and what is done with one."""
