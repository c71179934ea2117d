"""Plans and estimates in integers, before any tensor exists: blocks, operations, bytes, times."""
