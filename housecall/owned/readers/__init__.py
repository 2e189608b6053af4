"""From an owner's files to named columns: one reader a format, in a closed table by suffix. Nothing is guessed."""
