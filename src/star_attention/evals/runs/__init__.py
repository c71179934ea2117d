"""Running an evaluation: variants, folders, resuming, merging."""
