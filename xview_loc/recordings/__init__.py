"""Recorded drives: bags of pairs written, imported, read and summarised; tracks."""
