"""What a person calls: the `fomoe` command."""
