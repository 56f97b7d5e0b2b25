"""Train GPT language models on your own text with TensorFlow."""
