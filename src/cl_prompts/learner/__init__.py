"""What prompt learners and baselines share: losses, tasks, optimizer hooks."""
