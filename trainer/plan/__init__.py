"""What a run will need and how fast it will be, reckoned from its config. Standard library only."""
