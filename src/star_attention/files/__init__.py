"""Files that people bring: plain texts, documents read as texts, and names of other kinds."""
