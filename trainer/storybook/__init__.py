"""The built-in text: a grammar of children's stories, and the exact entropy of what it tells."""
