"""The operating system: files and stores, the terminal, processes, signals, and this machine."""
