"""Floor 4, the front doors: command line and report. No method logic here, and nobody imports this package."""
