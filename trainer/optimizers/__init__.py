"""How a step changes the weights: optimizers of gradients that were summed over replicas and clipped."""
