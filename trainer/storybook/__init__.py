"""The built-in text: a grammar of children's stories, and the exact probability and entropy of its stories."""
