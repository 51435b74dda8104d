"""Before a run: what it takes, whether it is right, what the machine can do."""
