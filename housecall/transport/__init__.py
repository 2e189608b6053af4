"""Where bytes go: one session's frames to one worker, its replies back."""
