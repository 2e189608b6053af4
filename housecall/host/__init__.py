"""A worker behind a wire: all its sessions, what waits for its turn, and the settings it runs with."""
