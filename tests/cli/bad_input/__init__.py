"""Bad input at the command line: one clear message, exit status 2, nothing half-written."""
