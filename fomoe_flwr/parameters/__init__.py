"""Names, shapes, sharing and fragments of parameters. No torch."""
