"""A federation of real processes: credentials, SuperLink, SuperNodes, and runs on them."""
