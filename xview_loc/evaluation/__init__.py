"""Errors of models, and of the vehicle's whole localisation on recorded drives."""
