"""What `validate.py` compares: predictions of the cost model with measurements."""
