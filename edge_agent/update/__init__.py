"""Updates: from a desired state to a committed or reverted version."""
