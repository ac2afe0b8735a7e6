"""Every pipeline schedule, and the registry that knows them by name."""
