"""Models in and out: the folders and files that a model is read from, and those that it is written into."""
