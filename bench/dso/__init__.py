"""The dispatcher under load: in process, and simulated."""
