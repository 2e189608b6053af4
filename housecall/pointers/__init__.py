"""What a scientist holds: tensors whose values live at a worker, and the sessions that reach them."""
