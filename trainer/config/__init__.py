"""The settings of a run: what there is to set, how a file and overrides set it, and how mistakes are refused."""
