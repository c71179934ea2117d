"""Results, their statistics, and how they are shown."""
