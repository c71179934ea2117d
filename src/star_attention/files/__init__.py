"""Files that people bring: plain text, what is none, and documents that can be read as text."""
