"""How several devices and several workers take one step together."""
