"""How several devices and several hosts take one step together."""
