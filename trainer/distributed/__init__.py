"""The devices and the workers of a run, and how they find each other."""
