"""What several programs share: timing, facts about the machine, baselines, plotting, prose."""
