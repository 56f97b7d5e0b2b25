"""From text sources to batches of tokens."""
