"""One worker's round: adopt the global weights, train the local steps, report what changed."""
