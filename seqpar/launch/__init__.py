"""From one job file to ranks that run, are watched, and come back after a fault."""
