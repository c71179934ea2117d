"""Where an encoded context lives: keys and values in memory, and in files."""
