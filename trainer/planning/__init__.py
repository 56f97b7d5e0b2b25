"""What a config costs before any of it is spent: by arithmetic, and by the devices' real compilers."""
