"""Code shared by several programs: timing, facts about the machine, baselines, plotting, prose."""
