"""The command line: one command a file. Torch is imported by the command that needs it, not by `--help`."""
