"""What an owner runs: one door in, one door out. Knows nothing of pointers, nor of who calls."""
