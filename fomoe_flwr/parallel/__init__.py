"""Several processes that train one worker together: one for each GPU of its node."""
