"""Importers of interaction logs into the store."""
