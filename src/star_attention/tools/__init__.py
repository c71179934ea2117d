"""What several programs share: facts about the machine, baselines, plotting."""
