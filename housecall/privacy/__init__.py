"""How a value may leave: stages that an update passes, the noise in it, and what that costs. Knows no torch."""
