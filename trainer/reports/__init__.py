"""How runs go and went: lists, reports and comparisons, on the terminal and as a page. TensorFlow is not loaded."""
