"""The data sets of a worker's owner: what they are, where they lie, their mocks, and how files become such."""
