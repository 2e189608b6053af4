"""How it is said: a closed union of messages, and their bytes. Knows no torch and no sockets."""
