"""The model: a GPT, its attention and its loss."""
