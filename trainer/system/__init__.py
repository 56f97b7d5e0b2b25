"""What trainer needs of the operating system: files and stores, the terminal, processes, signals."""
