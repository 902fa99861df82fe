"""What every trainer here shares: gradients over a context-parallel group, the learning rate's schedule, the log."""
