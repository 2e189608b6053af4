"""What may be said: typed tensor programs, as data. Only `run` knows torch."""
