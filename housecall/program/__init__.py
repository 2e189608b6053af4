"""What may be said: typed tensor programs, as data. Only `run`, `typing`, `outcome` and `forecast` know torch."""
